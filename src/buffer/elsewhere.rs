//! What takes long to give back.

use std::ops::Deref;
use std::thread;

/// Drops what it holds on a thread of its own: unmapping takes the longer the more was mapped, and the thread that lets
/// go of a mapping has others to serve.
#[derive(Debug)]
pub(crate) struct DroppedElsewhere<T: Send + 'static> {
    held: Option<T>,
}

impl<T: Send + 'static> DroppedElsewhere<T> {
    pub(crate) const fn new(held: T) -> Self {
        Self { held: Some(held) }
    }
}

impl<T: Send + 'static> Deref for DroppedElsewhere<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect("only `drop` takes it")
    }
}

impl<T: Send + 'static> Drop for DroppedElsewhere<T> {
    fn drop(&mut self) {
        let held = self.held.take();
        // Without another thread it is dropped here, with the closure.
        if let Err(error) = thread::Builder::new().name("release".into()).spawn(move || drop(held)) {
            tracing::debug!(%error, "no thread to give memory back on: this one has done it");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    struct Slow {
        go_on: mpsc::Receiver<()>,
        dropped: mpsc::Sender<thread::ThreadId>,
    }

    impl Drop for Slow {
        fn drop(&mut self) {
            self.go_on.recv().unwrap();
            self.dropped.send(thread::current().id()).unwrap();
        }
    }

    #[test]
    fn who_lets_go_does_not_wait() {
        // Broken in production: a decode worker with a large buffer that ends stops the transfers to all others meanwhile.
        let ((go_on, waits), (dropped, told)) = (mpsc::channel(), mpsc::channel());
        drop(DroppedElsewhere::new(Slow { go_on: waits, dropped }));
        go_on.send(()).unwrap();
        assert_ne!(told.recv_timeout(Duration::from_secs(60)).unwrap(), thread::current().id());
    }
}
