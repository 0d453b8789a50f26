//! Which chunk is where, in which state and whose. No memory, no clock, no peers.
//!
//! [`SlotPool`] hands out slots of a pd_buffer, each as long as its chunk; a sender needs no more.
//! [`SlotTable`] adds what a receiver must know of each slot: who may write it, and what can be read from it.

mod idle;
mod pool;
mod table;

pub use pool::{NoRoom, SlotPool, Taken};
pub use table::{SlotCounts, SlotState, SlotTable};
