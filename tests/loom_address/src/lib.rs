//! The address manager with loom's lock in place of the standard library's, and nothing else changed: the files are
//! the project's own.

#[path = "../../../src/address"]
pub mod address {
    //! As in `src/address/mod.rs`, but for `sync`.
    mod bitmap;
    mod error;
    mod manager;
    mod range;
    mod ranges;
    mod room;
    mod slots;
    mod space;
    mod sync {
        pub(super) use loom::sync::{Arc, Mutex, MutexGuard};
    }
    mod usage;

    pub use error::AddressError;
    pub use manager::{AddressManager, OwnedRange};
    pub use range::AddressRange;
    pub use room::MadeRoom;
    pub use usage::{Snapshot, Usage};
}
