//! How other threads probe the driver's health. One answer serves all that have asked, so a driver that does not answer leaves
//! nothing behind, however often it is probed.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::probe::Probe;
use crate::metrics::Snapshot;

/// How long a driver may take to answer before it counts as stuck. Nothing in it waits, so a turn takes microseconds.
pub(super) const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// How far a daemon has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No ready line yet; there is no driver to ask.
    Starting,
    /// Takes requests.
    Serving,
    /// Was told to stop, and takes no new requests.
    Draining,
}

/// What the driver said last.
#[derive(Debug, Clone)]
pub(super) struct HealthAnswer {
    /// The last question that it had seen.
    question: u64,
    pub(super) phase: Phase,
    /// None while starting.
    pub(super) snapshot: Option<Snapshot>,
    /// The question to the engine's thread that was open then. None while starting.
    pub(super) engine: Option<Probe>,
}

/// The driver has not answered within [`ANSWER_TIME_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoAnswer;

/// The asking end, for any thread.
#[derive(Debug, Clone)]
pub(super) struct HealthProbe {
    questions: watch::Sender<u64>,
    answers: watch::Receiver<HealthAnswer>,
}

/// The driver's end.
#[derive(Debug)]
pub(super) struct HealthResponder {
    questions: watch::Receiver<u64>,
    answers: watch::Sender<HealthAnswer>,
}

/// Both ends, of a daemon that is starting.
pub(super) fn health_probe() -> (HealthProbe, HealthResponder) {
    let (ask, questions) = watch::channel(0);
    let (answer, answers) =
        watch::channel(HealthAnswer { question: 0, phase: Phase::Starting, snapshot: None, engine: None });
    (HealthProbe { questions: ask, answers }, HealthResponder { questions, answers: answer })
}

impl HealthProbe {
    /// How the daemon is, at this moment or later. At once while it is starting.
    pub(super) async fn ask(&self) -> Result<HealthAnswer, NoAnswer> {
        let mut answers = self.answers.clone();
        if answers.borrow().phase == Phase::Starting {
            return Ok(answers.borrow().clone());
        }
        let mut question = 0;
        self.questions.send_modify(|asked| {
            *asked += 1;
            question = *asked;
        });
        let answered = timeout(ANSWER_TIME_MAX, answers.wait_for(|answer| answer.question >= question)).await;
        match answered {
            Ok(Ok(answer)) => Ok(answer.clone()),
            // The driver is slow, or has ended.
            Ok(Err(_)) | Err(_) => Err(NoAnswer),
        }
    }
}

impl HealthResponder {
    /// Returns when a probe has come; never, once no probe can come. Cancel-safe.
    pub(super) async fn asked(&mut self) {
        if self.questions.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Answers all probes that have come.
    pub(super) fn answer(&mut self, phase: Phase, snapshot: Snapshot, engine: Probe) {
        let question = *self.questions.borrow_and_update();
        self.answers.send_replace(HealthAnswer { question, phase, snapshot: Some(snapshot), engine: Some(engine) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connector::message::Status;
    use crate::metrics::Tally;
    use crate::node::NodeCounts;
    use crate::runtime::probe::Prober;

    fn snapshot(peers: u32) -> Snapshot {
        Snapshot {
            status: Status { peers, ..Status::default() },
            counts: NodeCounts::default(),
            tally: Tally::new("sender", true, false),
        }
    }

    #[tokio::test]
    async fn an_answer_is_never_older_than_its_question_and_silence_ends() {
        // Broken in production: a daemon whose driver is stuck is reported healthy from an old answer, or a scrape waits for
        // ever.
        let (probe, mut responder) = health_probe();
        assert_eq!(probe.ask().await.unwrap().phase, Phase::Starting, "nobody to ask yet");
        let engine = Prober::new().0.probe(drop);
        responder.answer(Phase::Serving, snapshot(1), engine.clone());
        assert_eq!(probe.ask().await.unwrap_err(), NoAnswer, "an answer from before the question");
        // Two who ask, the question from before included, are told by one answer.
        let asking = tokio::spawn({
            let probe = probe.clone();
            async move { tokio::join!(probe.ask(), probe.ask()) }
        });
        responder.asked().await;
        tokio::task::yield_now().await;
        responder.answer(Phase::Draining, snapshot(2), engine);
        let (first, second) = asking.await.unwrap();
        for answer in [first.unwrap(), second.unwrap()] {
            assert_eq!((answer.phase, answer.snapshot.unwrap().status.peers), (Phase::Draining, 2));
        }
        assert!(timeout(Duration::from_millis(50), responder.asked()).await.is_err(), "nobody has asked since");
        drop(responder);
        assert_eq!(probe.ask().await.unwrap_err(), NoAnswer, "the driver has ended");
    }
}
