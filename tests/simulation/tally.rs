//! What a run has seen.

macro_rules! tally {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// How often things happened, so that a run that tests nothing is noticed.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct Tally {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Tally {
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }

            /// A run in which something never happened has not tested it.
            pub fn assert_everything_happened(&self) {
                for (name, count) in [$((stringify!($name), self.$name),)*] {
                    let least = match (name.starts_with("lmcache_"), cfg!(feature = "lmcache")) {
                        (false, _) => 20,
                        // A fifth of the worlds has LMCache's peers.
                        (true, true) => 4,
                        (true, false) => 0,
                    };
                    assert!(count >= least, "{name} happened too seldom: {self:?}");
                }
            }
        }
    };
}

tally! {
    events,
    sent,
    failed,
    cancelled,
    fetched,
    /// Requests that were parked, questions that they be kept, and those that a reader got.
    parked,
    held,
    fetched_parked,
    /// Parked requests that were pushed ahead, that were not after all, and whose receiver was another; look-ups while they came.
    pushed_ahead,
    /// Of those that nobody is told of: ended because nobody took them.
    not_taken,
    ahead_dropped,
    wrong_guesses,
    seen_coming,
    lost_messages,
    repeated_messages,
    crashes,
    pauses,
    growths,
    landed_late,
    vanished,
    vouched,
    verifying,
    /// Events after which both halves of a daemon waited for room.
    both_wait,
    /// Of those fetched: by readers that had asked after an earlier attempt's end was told, and before theirs was granted.
    fetched_again,
    /// Pages that LMCache senders were granted by our receivers.
    lmcache_granted,
    /// Allocations of theirs that were refused.
    lmcache_refused,
    /// Chunks of theirs that they need not send.
    lmcache_shared,
    /// Batches after a request's first.
    lmcache_batches,
    /// Cancels of theirs.
    lmcache_cancelled,
    /// Requests of theirs that the proxy was told of.
    lmcache_announced,
    /// Of those: every chunk was handed to a reader that waited for them by name, or looked them up by key.
    lmcache_waited_for,
    lmcache_looked_up,
    /// Chunks that a reader asked for by key which had been granted to several.
    lmcache_ambiguous,
    /// Readers that came again, or after what they meant had been given up: these do not say of keys that they are written.
    lmcache_late,
    /// Pages that LMCache senders were told of and have read.
    lmcache_queried,
    /// Requests of ours that LMCache receivers have, and that were read there.
    lmcache_received,
    /// Chunks that an LMCache receiver said were there although their sender had been granted them and not written.
    lmcache_unwritten,
    /// Cancels that asynchronous LMCache receivers were told.
    lmcache_given_back,
    /// Allocations that LMCache receivers refused.
    lmcache_no_room,
    /// Connections to LMCache receivers that broke with a message on them.
    lmcache_cut,
}
