//! Which chunk is where, in which state and whose. No memory, no clock, no peers.
//!
//! [`SlotTable`] is what a node has: each slot's state, whose it is, and what can be read from it. The pool underneath hands out
//! slots, each as long as its chunk.

mod idle;
mod pool;
mod table;

pub use pool::NoRoom;
pub use table::{SlotCounts, SlotState, SlotTable};
