//! Tasks that wait for the ends of peers' processes: one for each process that can be seen from here, for as long as its
//! end matters.

use std::collections::BTreeMap;

use tokio::task::AbortHandle;

use super::process;
use crate::wire::message::ProcessIdentity;

/// The processes that are watched, by whose they are.
#[derive(Debug, Default)]
pub(super) struct Watches(BTreeMap<String, AbortHandle>);

impl Watches {
    /// Lets `tell` know when the process has ended. Nothing is known of a process that cannot be seen from here; of one
    /// that is watched already, it is told once.
    pub(super) fn watch(&mut self, instance: &str, process: &ProcessIdentity, tell: impl FnOnce() + Send + 'static) {
        if self.0.contains_key(instance) {
            return;
        }
        let Some(ended) = process::watch(process) else { return };
        let task = tokio::spawn(async move {
            ended.await;
            tell();
        });
        self.0.insert(instance.to_owned(), task.abort_handle());
    }

    /// Its end has been told, or does not matter any more.
    pub(super) fn forget(&mut self, instance: &str) {
        if let Some(task) = self.0.remove(instance) {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::runtime::Handle;
    use tokio::time::timeout;

    use super::*;

    /// Tasks are gone once the runtime has had its turn.
    async fn until_tasks_are(count: usize) {
        let alive = || Handle::current().metrics().num_alive_tasks();
        let reached = async {
            while alive() != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(20), reached).await.unwrap_or_else(|_| panic!("{} tasks, not {count}", alive()));
    }

    #[tokio::test]
    async fn nothing_stays_of_peers_that_come_and_go() {
        // Broken in production: a receiver keeps a task for every sender of another host that it ever met, until it has no
        // memory left.
        let own = process::own_identity().unwrap();
        let mut watches = Watches::default();
        for number in 0..100 {
            let elsewhere = ProcessIdentity { boot_id: format!("host {number}"), ..own.clone() };
            watches.watch(&format!("elsewhere {number}"), &elsewhere, || panic!("nothing can be known of it"));
        }
        assert_eq!((Handle::current().metrics().num_alive_tasks(), watches.0.len()), (0, 0));
        for number in 0..100 {
            watches.watch(&format!("here {number}"), own, || panic!("it has not ended"));
        }
        until_tasks_are(100).await;
        for number in 0..100 {
            watches.forget(&format!("here {number}"));
        }
        until_tasks_are(0).await;
        assert!(watches.0.is_empty());
    }

    #[tokio::test]
    async fn an_end_is_told_once_however_often_its_peer_shook_hands() {
        // Broken in production: the slots of a killed sender stay quarantined, or are freed twice.
        let gone = ProcessIdentity { start_ticks: 1, ..process::own_identity().unwrap().clone() };
        let (told, mut ends) = tokio::sync::mpsc::unbounded_channel();
        let mut watches = Watches::default();
        for _ in 0..3 {
            let told = told.clone();
            watches.watch("s", &gone, move || told.send(()).unwrap());
        }
        drop(told);
        timeout(Duration::from_secs(20), ends.recv()).await.unwrap().expect("it has ended");
        assert_eq!(timeout(Duration::from_secs(20), ends.recv()).await.unwrap(), None, "told twice");
    }
}
