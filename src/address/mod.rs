//! The address manager: a virtual address space from 0, with no memory in it.
//!
//! It says which ranges are taken. Where the bytes live, and for how long, is the business of whoever maps addresses
//! to memory. From the outside in:
//!
//! - [`AddressManager`] (`manager`): one lock, and handles that give their range back when dropped;
//! - `space`: the decisions, without a lock. Most ranges have one length, a slot, and come from
//! - `room`: which ranges to give back for a request that finds no room;
//! - `slots`: a grid of slots, free or not, one bit each (`bitmap`). Every other length comes from
//! - `ranges`: free ranges of any length, found by best fit, in slots lent by the grid and handed back once whole.
//!
//! docs/decisions/0004-address-manager.md says why, with figures.

mod bitmap;
mod error;
mod manager;
mod range;
mod ranges;
mod room;
mod slots;
mod space;
mod usage;

pub use error::AddressError;
pub use manager::{AddressManager, OwnedRange};
pub use range::AddressRange;
pub use room::MadeRoom;
pub use usage::{Usage, UsageSnapshot};
