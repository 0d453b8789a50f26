//! Requests shipped side by side: granted, filled, sent, awaited at both ends, every byte compared.

use std::time::{Duration, Instant};

use futures::future::try_join_all;

use crate::connector::message::{Reply, Request, Timings};
use crate::ids::{LeaseId, ReadyChunk, Seq, SlotPart, StagedSlot};

use super::error::BenchError;
use super::pair::Pair;
use super::plan::PlannedRequest;
use super::pool::{Pool, first_difference};

/// Bytes are compared in pieces that stay in a processor's cache.
const PIECE_LEN_BYTES: usize = 256 * 1024;

/// What a round took.
#[derive(Debug)]
pub(super) struct RoundOutcome {
    /// Time in which at least one request was between `send` and `sent`.
    pub busy: Duration,
    /// One for each request, in the order they were sent.
    pub requests: Vec<RequestOutcome>,
}

/// What a request took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RequestOutcome {
    /// From `send` until `sent` had arrived here.
    pub latency: Duration,
    /// Bytes that the sender says it wrote.
    pub bytes: u64,
    /// The sender's own account.
    pub timings: Timings,
}

/// Ships these requests side by side, in each direction; `verified` hears of the bytes of each request that was compared.
///
/// Only the part from the first `send` to the last `sent` is timed: granting, filling and comparing happen while
/// nothing is moved, so that the engine under measurement has the machine to itself.
///
/// # Errors
/// [`BenchError::Mismatch`] for a wrong byte, and whatever the daemons refuse.
pub(super) async fn ship(
    pairs: &mut [Pair],
    requests: &[Vec<PlannedRequest>],
    pool: &Pool,
    mut verified: impl FnMut(u64),
) -> Result<RoundOutcome, BenchError> {
    let mut waits = Vec::with_capacity(pairs.len());
    let mut sends = Vec::with_capacity(pairs.len());
    for (pair, requests) in pairs.iter_mut().zip(requests) {
        open(pair, requests).await?;
        let parts = fill(pair, requests, pool).await?;
        waits.push(wait(pair, requests)?);
        sends.push((pair, requests, parts));
    }
    let started = Instant::now();
    let outcomes = try_join_all(sends.into_iter().map(|(pair, requests, parts)| send(pair, requests, parts))).await?;
    let busy = outcomes.iter().map(|(finished, _)| *finished - started).max().unwrap_or_default();
    let outcomes = outcomes.into_iter().flat_map(|(_, outcomes)| outcomes).collect();
    for ((pair, requests), waits) in pairs.iter_mut().zip(requests).zip(waits) {
        for (request, wait) in requests.iter().zip(waits) {
            let (lease, chunks) = ready(pair, wait).await?;
            verify(pair, request, &chunks, pool)?;
            pair.receiver.link.request(|id| Request::Release { id, lease, after: None }).await?;
            verified(request.len_bytes());
        }
    }
    Ok(RoundOutcome { busy, requests: outcomes })
}

/// A reader begins to wait for each request.
fn wait(pair: &mut Pair, requests: &[PlannedRequest]) -> Result<Vec<Seq>, BenchError> {
    let wait = |request: &PlannedRequest| {
        let req_id = request.req_id.clone();
        pair.receiver.link.start(|id| {
            let (wait_ms, uncommitted, until_announced) = (None, false, false);
            Request::Wait { id, req_id, wait_ms, uncommitted, until_announced }
        })
    };
    requests.iter().map(wait).collect()
}

async fn open(pair: &mut Pair, requests: &[PlannedRequest]) -> Result<(), BenchError> {
    let mut opens = Vec::with_capacity(requests.len());
    for request in requests {
        let receiver = pair.address.clone();
        let open = pair.sender.link.start(|id| Request::Open {
            id,
            req_id: request.req_id.clone(),
            keys: request.keys.clone(),
            groups: Vec::new(),
            last_chunk_tokens: request.last_chunk_tokens,
            receiver,
            wait_ms: None,
            stage: false,
        });
        opens.push(open?);
    }
    for open in opens {
        match pair.sender.link.reply(open).await? {
            Reply::Opened { already_sent, .. } if already_sent.is_empty() => {}
            other => {
                return Err(pair.sender.link.unexpected("opened, with nothing sent before", &other));
            }
        }
    }
    Ok(())
}

/// Stages and fills every chunk of every request; the parts to send, request by request.
async fn fill(pair: &mut Pair, requests: &[PlannedRequest], pool: &Pool) -> Result<Vec<Vec<SlotPart>>, BenchError> {
    let mut parts = Vec::with_capacity(requests.len());
    for request in requests {
        let req_id = request.req_id.clone();
        let chunks = (0..request.keys.len() as u32).collect();
        let reply = pair.sender.link.request(|id| Request::Stage { id, req_id, chunks, wait_ms: None }).await?;
        let Reply::Staged { slots, .. } = reply else {
            return Err(pair.sender.link.unexpected("staged", &reply));
        };
        if !is_what_was_asked_for(&slots, request) {
            let seen = Reply::Staged { id: Seq(0), slots };
            return Err(pair.sender.link.unexpected("a slot of the right length for each chunk", &seen));
        }
        for (slot, content) in slots.iter().zip(&request.contents) {
            pair.sender.write(slot.offset_bytes, pool.content(content.pool_offset, content.len_bytes))?;
        }
        parts.push(slots.iter().map(|slot| SlotPart { slot: slot.slot, offset_bytes: 0, len_bytes: None }).collect());
    }
    Ok(parts)
}

fn is_what_was_asked_for(slots: &[StagedSlot], request: &PlannedRequest) -> bool {
    slots.len() == request.contents.len()
        && slots
            .iter()
            .zip(&request.contents)
            .enumerate()
            .all(|(position, (slot, content))| slot.chunk as usize == position && slot.len_bytes == content.len_bytes)
}

/// When the last was sent, and what each took.
async fn send(
    pair: &mut Pair,
    requests: &[PlannedRequest],
    parts: Vec<Vec<SlotPart>>,
) -> Result<(Instant, Vec<RequestOutcome>), BenchError> {
    let link = &mut pair.sender.link;
    let mut sent_at = Vec::with_capacity(requests.len());
    let mut accepts = Vec::with_capacity(requests.len());
    for (request, parts) in requests.iter().zip(parts) {
        let req_id = request.req_id.clone();
        sent_at.push(Instant::now());
        accepts.push(link.start(|id| Request::Send { id, req_id, parts, last: true, after: None })?);
    }
    let mut outcomes = vec![RequestOutcome::default(); requests.len()];
    let mut finished = Instant::now();
    for _ in requests {
        let event = link.sent().await?;
        finished = Instant::now();
        let Reply::Sent { req_id, bytes, timings, .. } = &event else {
            return Err(link.unexpected("`sent`", &event));
        };
        let Some(index) = requests.iter().position(|request| request.req_id == *req_id) else {
            return Err(link.unexpected("`sent` of a request of this round", &event));
        };
        if *bytes != requests[index].len_bytes() {
            return Err(link.unexpected(&format!("{} bytes to be sent", requests[index].len_bytes()), &event));
        }
        outcomes[index] = RequestOutcome { latency: finished - sent_at[index], bytes: *bytes, timings: *timings };
    }
    for accept in accepts {
        link.reply(accept).await?;
    }
    // All were sent before the first event was taken in, so there is no gap between the first and the last.
    Ok((finished, outcomes))
}

async fn ready(pair: &mut Pair, wait: Seq) -> Result<(LeaseId, Vec<ReadyChunk>), BenchError> {
    match pair.receiver.link.reply(wait).await? {
        Reply::Ready { lease, chunks, .. } => Ok((lease, chunks)),
        other => Err(pair.receiver.link.unexpected("ready", &other)),
    }
}

/// Every byte of every chunk, read from the receiver's buffer.
fn verify(pair: &Pair, request: &PlannedRequest, chunks: &[ReadyChunk], pool: &Pool) -> Result<(), BenchError> {
    let right = chunks.len() == request.keys.len()
        && chunks
            .iter()
            .zip(request.keys.iter().zip(&request.contents))
            .all(|(chunk, (key, content))| chunk.key == *key && chunk.len_bytes == content.len_bytes);
    if !right {
        let reason = format!("expected the {} chunks of {}, saw {chunks:?}", request.keys.len(), request.req_id);
        return Err(BenchError::Connector { role: "receiver", reason });
    }
    let mut seen = vec![0; PIECE_LEN_BYTES];
    for (position, (chunk, content)) in chunks.iter().zip(&request.contents).enumerate() {
        let expected = pool.content(content.pool_offset, content.len_bytes);
        for (index, expected) in expected.chunks(PIECE_LEN_BYTES).enumerate() {
            let start = (index * PIECE_LEN_BYTES) as u64;
            let seen = &mut seen[..expected.len()];
            pair.receiver.read(chunk.offset_bytes + start, seen)?;
            if let Some(difference) = first_difference(expected, seen) {
                return Err(BenchError::Mismatch {
                    req_id: request.req_id.clone(),
                    chunk: position as u32,
                    offset: start + difference.offset as u64,
                    len_bytes: content.len_bytes,
                    expected: difference.expected,
                    seen: difference.seen,
                });
            }
        }
    }
    Ok(())
}
