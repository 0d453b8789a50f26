//! What can happen, and whom to.

use pd_backend::ids::{ChunkKey, ClientId, ConnectionId, GrantId, LeaseId, PeerId, RequestId, StagedSlot, TransferId};
use pd_backend::node::incoming::ExpectedChunk;
use pd_backend::wire::Message;

use crate::lmcache_sender::Put;
use crate::network::Route;
use crate::parked::Ask;

/// One life of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Proc {
    pub index: usize,
    pub life: u32,
}

/// Whom something happens to. A daemon that is both is named either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Sender(Proc),
    Receiver(Proc),
    World,
}

impl Target {
    /// Which sender, or which receiver; a two-role daemon is the same number of both.
    pub fn at(self) -> Proc {
        match self {
            Self::Sender(at) | Self::Receiver(at) => at,
            Self::World => unreachable!("the world is no process"),
        }
    }
}

/// Something that happens.
#[derive(Debug, Clone)]
pub enum WorldEvent {
    // To any daemon.
    Timer(Target),
    Grows(Target),
    // To a sender.
    Opened(Proc, PeerId),
    Closed(Proc, PeerId),
    ToSender(Route, Box<Message>),
    Met(Proc, PeerId),
    Warm(Proc, PeerId),
    Updated(Proc, PeerId, ConnectionId),
    Done(Proc, TransferId, bool),
    Open(Proc, usize),
    Fill(Proc, usize, Vec<StagedSlot>),
    Cancel(Proc, usize),
    Acknowledge(Proc, usize),
    SenderReset(Proc, usize),
    ConnectorGone(Proc, ClientId),
    // To an LMCache sender.
    Put(Proc, Put),
    GoOn(Proc),
    Written(Proc, u64, bool),
    LmcacheCancels(Proc, usize),
    Query(Proc, usize),
    QueryRead(Proc, Proc, LeaseId),
    // To a receiver.
    ToReceiver(Route, Box<Message>),
    RouteGone(Route),
    ReceiverLoads(Proc, String),
    Verifying(Proc),
    Verified(Proc, RequestId, GrantId, Vec<ExpectedChunk>),
    ProcessEnded(Proc, String),
    Wait(Proc, RequestId),
    AskParked(Proc, Ask),
    ReleaseParked(Proc, usize, RequestId),
    SourceOpened(Proc, PeerId),
    SourceClosed(Proc, PeerId),
    Lookup(Proc),
    LookAhead(Proc, usize),
    ReaderCancels(Proc, RequestId),
    ReceiverReset(Proc),
    Release(Proc, ClientId, LeaseId),
    ReaderGone(Proc, ClientId),
    ReadUncommitted(Proc, usize, bool),
    // To an LMCache receiver.
    LmcacheWorks(Proc),
    LmcacheRead(Proc, Proc, RequestId, Vec<ChunkKey>),
    // To everything else.
    Start(usize),
    LmcacheStart(usize),
    QueryOver(Proc, LeaseId),
    Land(u64, usize),
    Crash(bool, usize),
    Restart(bool, usize),
    Pause(bool, usize, u64),
    Resume(Target),
    Part(usize, usize, bool),
    Settle,
    Tend,
    Fresh,
}

impl WorldEvent {
    pub fn target(&self) -> Target {
        match self {
            Self::Timer(target) | Self::Grows(target) => *target,
            Self::Opened(at, _)
            | Self::Closed(at, _)
            | Self::Met(at, _)
            | Self::Warm(at, _)
            | Self::Updated(at, ..)
            | Self::Done(at, ..)
            | Self::Open(at, _)
            | Self::Fill(at, ..)
            | Self::Cancel(at, _)
            | Self::Acknowledge(at, _)
            | Self::SenderReset(at, _)
            | Self::ConnectorGone(at, _)
            | Self::Put(at, _)
            | Self::GoOn(at)
            | Self::Written(at, ..)
            | Self::LmcacheCancels(at, _)
            | Self::Query(at, _)
            | Self::QueryRead(at, ..) => Target::Sender(*at),
            Self::ToSender(route, _) => Target::Sender(route.sender),
            Self::ToReceiver(route, _) | Self::RouteGone(route) => Target::Receiver(route.receiver),
            Self::ReceiverLoads(at, _)
            | Self::Verifying(at)
            | Self::Verified(at, ..)
            | Self::ProcessEnded(at, _)
            | Self::Wait(at, _)
            | Self::AskParked(at, _)
            | Self::ReleaseParked(at, ..)
            | Self::SourceOpened(at, _)
            | Self::SourceClosed(at, _)
            | Self::Lookup(at)
            | Self::LookAhead(at, _)
            | Self::ReaderCancels(at, _)
            | Self::ReceiverReset(at)
            | Self::Release(at, ..)
            | Self::ReaderGone(at, _)
            | Self::ReadUncommitted(at, ..)
            | Self::LmcacheWorks(at)
            | Self::LmcacheRead(at, ..) => Target::Receiver(*at),
            Self::Start(_)
            | Self::LmcacheStart(_)
            | Self::QueryOver(..)
            | Self::Land(..)
            | Self::Crash(..)
            | Self::Restart(..)
            | Self::Pause(..)
            | Self::Resume(_)
            | Self::Part(..)
            | Self::Settle
            | Self::Tend
            | Self::Fresh => Target::World,
        }
    }
}
