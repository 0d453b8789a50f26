//! `pd-bench status`: what a running daemon has and has counted, asked through either of its doors.

use std::time::Duration;

use comfy_table::{Table, presets};

use super::error::BenchError;
use super::options::StatusOptions;
use super::report::mib;
use super::scrape::{self, Sample};
use crate::connector::client::Client;
use crate::connector::message::{BufferUsage, CONNECTOR_API_VERSION, Reply, Request, Status};

/// Asks, and prints.
pub(super) async fn run(options: &StatusOptions) -> Result<(), BenchError> {
    let patience = Duration::from_secs(options.timeout_s);
    let (endpoint, answer) = match (&options.connector, &options.metrics) {
        (Some(endpoint), _) => (endpoint, ask(endpoint, patience).await),
        (None, Some(url)) => (url, scrape::fetch(url, patience).await.and_then(|text| read(&text))),
        (None, None) => unreachable!("the command line has one of them"),
    };
    let status = answer.map_err(|reason| BenchError::Status { endpoint: endpoint.clone(), reason })?;
    if options.json {
        println!("{}", serde_json::to_string(&status).expect("a status has no keys that JSON lacks"));
    } else {
        println!("{}", show(&status));
    }
    Ok(())
}

/// Through the connector API.
async fn ask(endpoint: &str, patience: Duration) -> Result<Status, String> {
    let exchange = async {
        let mut client = Client::connect(endpoint, patience).await.map_err(|error| error.to_string())?;
        let id = client.next_id();
        let attach = Request::Attach { id, version: CONNECTOR_API_VERSION, client: "pd-bench status".to_owned() };
        request(&mut client, &attach).await?;
        let id = client.next_id();
        let Reply::Status { mut status, .. } = request(&mut client, &Request::Status { id }).await? else {
            return Err("expected status, saw another reply".to_owned());
        };
        let id = client.next_id();
        request(&mut client, &Request::Detach { id }).await?;
        // We are none of the daemon's engines.
        status.clients = status.clients.saturating_sub(1);
        Ok(status)
    };
    match tokio::time::timeout(patience, exchange).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer within {patience:?} (--timeout-s)")),
    }
}

async fn request(client: &mut Client, request: &Request) -> Result<Reply, String> {
    match client.request(request).await {
        Ok(Reply::Error { kind, text, .. }) => Err(format!("{kind}: {text}")),
        Ok(reply) => Ok(reply),
        Err(error) => Err(error.to_string()),
    }
}

/// Out of the text of `/metrics`.
fn read(text: &str) -> Result<Status, String> {
    let samples = scrape::parse(text)?;
    let of = |name: &'static str| samples.iter().filter(move |sample| sample.name == name);
    let one = |name: &'static str| of(name).next().map(|sample| sample.value as u64);
    let by = |name: &'static str, label: &str, value: &str| {
        of(name).find(|sample| label_of(sample, label) == value).map_or(0, |sample| sample.value as u64)
    };
    let needed = |name: &'static str| one(name).ok_or_else(|| format!("there is no {name}: not a daemon's metrics"));
    let slots = |state: &str| by("pd_slots", "state", state) as u32;
    let build = of("pd_build_info").next().ok_or("there is no pd_build_info: not a daemon's metrics")?;
    let outcomes = || of("pd_requests_total").map(|sample| (label_of(sample, "outcome"), sample.value as u64));
    let went_well = |outcome: &str| matches!(outcome, "sent" | "ready");
    let (used_bytes, free_bytes) = (by("pd_buffer_bytes", "state", "used"), by("pd_buffer_bytes", "state", "free"));
    Ok(Status {
        role: label_of(build, "role").to_owned(),
        engine: label_of(build, "engine").to_owned(),
        slot_count: needed("pd_slots_max")? as u32,
        slots_free: slots("available"),
        slots_reserved: slots("reserved"),
        slots_ready: slots("ready_held") + slots("parked") + slots("ready_idle"),
        slots_quarantined: slots("quarantined"),
        slots_parked: slots("parked"),
        requests_active: needed("pd_requests_active")? as u32,
        requests_done: outcomes().filter(|(outcome, _)| went_well(outcome)).map(|(_, count)| count).sum(),
        requests_failed: outcomes().filter(|(outcome, _)| !went_well(outcome)).map(|(_, count)| count).sum(),
        bytes: needed("pd_transferred_bytes_total")?,
        peers: needed("pd_peers")? as u32,
        clients: needed("pd_clients")? as u32,
        buffer: BufferUsage {
            len_bytes: used_bytes + free_bytes,
            len_max_bytes: needed("pd_buffer_max_bytes")?,
            used_bytes,
            free_bytes,
            largest_free_bytes: needed("pd_buffer_largest_free_bytes")?,
            free_range_count: needed("pd_buffer_free_ranges")?,
            chunks_fit: of("pd_buffer_chunks_fit").map(|sample| sample.value as u64).collect(),
        },
        slots_held: slots("ready_held") + slots("parked"),
        requests_waiting: by("pd_waits", "what", "slots") as u32,
        waits: (by("pd_waits", "what", "stage") + by("pd_waits", "what", "ready")) as u32,
        leases: one("pd_leases").unwrap_or(0) as u32,
        transfers_in_flight: one("pd_transfers_in_flight").unwrap_or(0) as u32,
        chunks_expired: one("pd_chunks_expired_total").unwrap_or(0),
        draining: needed("pd_draining")? != 0,
        failures: outcomes()
            .filter(|(outcome, count)| !went_well(outcome) && *count > 0)
            .map(|(outcome, count)| (outcome.to_owned(), count))
            .collect(),
        engine_silent_ms: one("pd_engine_silent_seconds").unwrap_or(0) * 1000,
        // Metrics count them, and name none.
        receivers: Vec::new(),
        sources: Vec::new(),
    })
}

fn label_of<'a>(sample: &'a Sample, label: &str) -> &'a str {
    sample.labels.get(label).map_or("", String::as_str)
}

/// For people.
fn show(status: &Status) -> Table {
    let receives = status.role != "sender";
    let buffer = &status.buffer;
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    let doing = if status.draining { "draining: takes no new requests" } else { "takes requests" };
    let name = match status.role.as_str() {
        "both" => "sends and receives".to_owned(),
        role => format!("pd-{role}"),
    };
    row("daemon", format!("{name}, engine {}, {doing}", status.engine));
    if status.engine_silent_ms > 0 {
        row(
            "engine's thread",
            format!("has taken nothing up for {} s: stuck, or copying", status.engine_silent_ms / 1000),
        );
    }
    row("slots", format!("{}: {} available, {} reserved", status.slot_count, status.slots_free, status.slots_reserved));
    if receives {
        row("slots ready", format!("{}, {} of them needed", status.slots_ready, status.slots_held));
        row("slots quarantined", status.slots_quarantined.to_string());
    }
    let grown = if buffer.len_bytes < buffer.len_max_bytes {
        format!(", can become {} MiB", mib(buffer.len_max_bytes))
    } else {
        String::new()
    };
    row("buffer", format!("{} MiB: {} used{grown}", mib(buffer.len_bytes), mib(buffer.used_bytes)));
    row(
        "free in the buffer",
        format!(
            "{} MiB in {} ranges, the longest {} ({} % fragmented)",
            mib(buffer.free_bytes),
            buffer.free_range_count,
            mib(buffer.largest_free_bytes),
            fragmented_percent(buffer)
        ),
    );
    let fits: Vec<String> = buffer.chunks_fit.iter().map(u64::to_string).collect();
    row("whole chunks that fit", fits.join(", "));
    row("requests active", format!("{}, {} of them wait for slots", status.requests_active, status.requests_waiting));
    let done = match status.role.as_str() {
        "sender" => "requests sent",
        "receiver" => "requests ready",
        _ => "requests sent or ready",
    };
    row(done, status.requests_done.to_string());
    let kinds: Vec<String> = status.failures.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    let kinds = if kinds.is_empty() { String::new() } else { format!(": {}", kinds.join(", ")) };
    row("requests failed", format!("{}{kinds}", status.requests_failed));
    row("moved", format!("{} MiB", mib(status.bytes)));
    if receives {
        row("waits, leases", format!("{}, {}", status.waits, status.leases));
        row("chunks expired", status.chunks_expired.to_string());
    } else {
        row("stage calls that wait", status.waits.to_string());
        row("transfers in flight", status.transfers_in_flight.to_string());
    }
    row("peers, connectors", format!("{}, {}", status.peers, status.clients));
    for receiver in &status.receivers {
        let why = receiver.failure.as_ref().map(|failure| format!(": {failure}")).unwrap_or_default();
        row(&format!("receiver {}", receiver.address), format!("{}{why}", receiver.state.as_str()));
    }
    table
}

/// How much of what is free is outside the longest free range, in percent.
fn fragmented_percent(buffer: &BufferUsage) -> u64 {
    match buffer.free_bytes {
        0 => 0,
        free => 100 * (free - buffer.largest_free_bytes.min(free)) / free,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::connector::message::{ReceiverState, ReceiverStatus};
    use crate::ids::{Failure, FailureKind, ReceiverAddress, RequestId};
    use crate::metrics::{Snapshot, Tally, exposition};
    use crate::node::incoming::{IncomingCounts, IncomingNote};
    use crate::node::outgoing::OutgoingCounts;
    use crate::node::{self, NodeCounts};

    fn receiver() -> Snapshot {
        let mut tally = Tally::new("receiver", false, true);
        let request = || RequestId::new("r").unwrap();
        for bytes in [1000, 1 << 30] {
            let took = Duration::from_millis(5);
            let note = IncomingNote::Committed { request: request(), instance: "s".into(), chunks: 2, bytes, took };
            tally.count(&node::Note::<()>::Incoming(note));
        }
        for kind in [FailureKind::Expired, FailureKind::PeerLost, FailureKind::PeerLost] {
            let failure = Failure::new(kind, "");
            let note = IncomingNote::Failed { request: request(), instance: "s".into(), failure, quarantined: 2 };
            tally.count(&node::Note::<()>::Incoming(note));
        }
        let status = Status {
            role: "receiver".into(),
            engine: "local".into(),
            slot_count: 64,
            slots_free: 60,
            slots_reserved: 2,
            slots_ready: 5,
            slots_quarantined: 1,
            slots_parked: 0,
            requests_active: 3,
            requests_done: 2,
            requests_failed: 3,
            bytes: (1 << 30) + 1000,
            peers: 4,
            clients: 6,
            buffer: BufferUsage {
                len_bytes: 5 << 20,
                len_max_bytes: 8 << 20,
                used_bytes: 1 << 20,
                free_bytes: 4 << 20,
                largest_free_bytes: 3 << 20,
                free_range_count: 2,
                chunks_fit: vec![3, 7],
            },
            slots_held: 4,
            requests_waiting: 1,
            waits: 9,
            leases: 8,
            transfers_in_flight: 0,
            chunks_expired: 11,
            draining: true,
            failures: BTreeMap::from([("expired".to_owned(), 1), ("peer_lost".to_owned(), 2)]),
            engine_silent_ms: 4000,
            receivers: Vec::new(),
            sources: Vec::new(),
        };
        let half = IncomingCounts { readers_waiting: 9, ..IncomingCounts::default() };
        let counts = NodeCounts { incoming: Some(half), ..NodeCounts::default() };
        Snapshot { status, counts, tally }
    }

    #[test]
    fn both_doors_lead_to_the_same_status() {
        // Broken in production: an operator's graph and the status of the same daemon contradict each other, because a
        // metric was renamed, or shows another number.
        let snapshot = receiver();
        let status = snapshot.status.clone();
        assert_eq!(read(&exposition(snapshot, None).unwrap()).unwrap(), status);
        let (transfers_in_flight, engine) = (5, "nixl".to_owned());
        let status = Status { role: "sender".into(), engine, transfers_in_flight, waits: 2, ..Status::default() };
        let half = OutgoingCounts { stages_waiting: 2, ..OutgoingCounts::default() };
        let counts = NodeCounts { outgoing: Some(half), ..NodeCounts::default() };
        let snapshot = Snapshot { status: status.clone(), counts, tally: Tally::new("sender", true, false) };
        assert_eq!(read(&exposition(snapshot, None).unwrap()).unwrap(), status);
        assert!(read("up 1\n").unwrap_err().contains("not a daemon's"));
    }

    #[test]
    fn a_person_sees_what_is_wrong() {
        // Broken in production: the table hides quarantined slots, failures or a fragmented buffer.
        let table = show(&receiver().status).to_string();
        for words in [
            "draining",
            "64: 60 available, 2 reserved",
            "5, 4 of them needed",
            "4 MiB in 2 ranges, the longest 3 (25 % fragmented)",
            "5 MiB: 1 used, can become 8 MiB",
            "3: expired 1, peer_lost 2",
            "3, 7",
        ] {
            assert!(table.contains(words), "{words}:\n{table}");
        }
        let address = ReceiverAddress { host: "10.0.0.2".into(), init_port: 7300, alloc_port: 7400 };
        let failure = Failure::new(FailureKind::LayoutMismatch, "dtype is float16 at r and bfloat16 at s");
        let receivers = vec![ReceiverStatus { address, state: ReceiverState::Refused, failure: Some(failure) }];
        let table = show(&Status { receivers, ..Status::default() }).to_string();
        assert!(
            table.contains("receiver 10.0.0.2:7300/7400") && table.contains("refused: layout_mismatch: dtype is"),
            "{table}"
        );
    }
}
