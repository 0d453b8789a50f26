//! A request's name inside the node.

/// A request's name inside the node: a client may use the same [`RequestId`] again while the transfers of its
/// predecessor are still ending.
pub(in crate::node) type Uid = u64;

/// Whose registration, and what it calls it.
pub(in crate::node) type RegistrationId = (String, crate::ids::RequestId);
