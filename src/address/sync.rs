//! The lock and the pointer that the manager uses, in one place: `tests/loom_address` puts loom's here.

pub(super) use std::sync::{Arc, Mutex, MutexGuard};
