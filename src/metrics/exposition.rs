//! Every metric's name, type, unit and help, and the text that Prometheus reads. docs/operations.md says what to do
//! with each of them.

use std::borrow::Cow;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use super::durations::DurationCounts;
use super::tally::ByKind;
use super::{ProcessUsage, Snapshot};
use crate::connector::message::ReceiverState;

/// Content type of the text for whoever accepts it.
pub const CONTENT_TYPE_OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Content type of the same text for others: it reads as the older format too, with counters untyped.
pub const CONTENT_TYPE_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The text of a scrape.
///
/// # Errors
/// Those of the library that writes it; none is known.
pub fn exposition(snapshot: Snapshot, process: Option<ProcessUsage>) -> Result<String, fmt::Error> {
    let role = (Cow::Borrowed("role"), Cow::Borrowed(snapshot.tally.role));
    let mut registry = Registry::with_labels([role].into_iter());
    registry.register_collector(Box::new(DaemonMetrics(snapshot)));
    if let Some(process) = process {
        registry.register_collector(Box::new(Process(process)));
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct DaemonMetrics(Snapshot);

impl Collector for DaemonMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page { encoder };
        self.encode_requests(&mut page)?;
        self.encode_peers(&mut page)?;
        self.encode_slots(&mut page)?;
        self.encode_buffer(&mut page)?;
        let version = [("version", env!("CARGO_PKG_VERSION")), ("engine", self.0.status.engine.as_str())];
        let mut build = page.encoder.encode_descriptor(
            "pd_build_info",
            "Which program this is; always 1.",
            None,
            MetricType::Gauge,
        )?;
        build.encode_family(&version)?.encode_gauge(&1_u64)
    }
}

impl DaemonMetrics {
    fn encode_requests(&self, page: &mut Page<'_>) -> fmt::Result {
        let Snapshot { status, counts, tally } = &self.0;
        let mut outcomes = tally.requests_failed.clone();
        let done = [(tally.sends, "sent", tally.requests_sent), (tally.receives, "ready", tally.requests_ready)];
        outcomes.extend(done.into_iter().filter(|(has, ..)| *has).map(|(_, outcome, count)| (outcome, count)));
        page.counters("pd_requests", "Requests by how they ended.", "outcome", &outcomes)?;
        page.gauge("pd_requests_active", "Requests that have not ended.", None, status.requests_active.into())?;
        page.gauge(
            "pd_draining",
            "1 once the daemon takes no new requests, because it was told to stop.",
            None,
            status.draining.into(),
        )?;
        let mut waits = vec![("slots", status.requests_waiting.into())];
        waits.extend(counts.outgoing.map(|half| ("stage", half.stages_waiting as u64)));
        waits.extend(counts.incoming.map(|half| ("ready", half.readers_waiting as u64)));
        page.gauges(
            "pd_waits",
            "What waits now: requests for slots of the receiver, and stage and wait calls of connectors.",
            None,
            "what",
            &waits,
        )?;
        page.histograms("pd_phase", "How long each phase of a request took.", "phase", tally.phases.iter())?;
        page.counter("pd_transferred", "Bytes of committed requests.", Some(Unit::Bytes), tally.bytes)?;
        page.counter("pd_chunks", "Chunks of requests that were granted.", None, tally.chunks)?;
        page.counter(
            "pd_chunks_already_sent",
            "Of those, chunks that the receiver held already.",
            None,
            tally.chunks_already_sent,
        )?;
        page.counter(
            "pd_integrity_failures",
            "Requests that failed because a chunk's checksum did not match.",
            None,
            tally.integrity_failures,
        )?;
        if tally.receives {
            page.counter(
                "pd_chunks_expired",
                "Chunks freed because nobody fetched or used them in time.",
                None,
                status.chunks_expired,
            )?;
            page.counters(
                "pd_allocations_refused",
                "Allocations that senders were refused, by reason.",
                "kind",
                &tally.allocations_refused,
            )?;
            page.counters(
                "pd_fetches_failed",
                "Questions to senders for parked chunks that came to nothing.",
                "kind",
                &tally.fetches_failed,
            )?;
        }
        if tally.sends {
            page.gauge(
                "pd_transfers_in_flight",
                "Transfers that the engine has not finished.",
                None,
                status.transfers_in_flight.into(),
            )?;
            page.counter("pd_requests_parked", "Requests whose chunks were parked.", None, tally.requests_parked)?;
            page.counters(
                "pd_registrations",
                "Questions of receivers for parked chunks, by what became of them.",
                "state",
                &tally.registrations,
            )?;
            page.counters(
                "pd_pushes_ahead",
                "Parked requests that were pushed to a receiver before it asked, by what became of it.",
                "result",
                &tally.pushes_ahead,
            )?;
            page.counter(
                "pd_wrong_guesses",
                "Parked requests that were pushed to one receiver, and asked for by another.",
                None,
                tally.wrong_guesses,
            )?;
        }
        page.gauge(
            "pd_engine_silent",
            "For how long the engine's thread has not taken up what it was asked.",
            Some(Unit::Seconds),
            status.engine_silent_ms / 1000,
        )?;
        page.gauge("pd_clients", "Attached connectors.", None, status.clients.into())?;
        page.counters(
            "pd_connector_errors",
            "Errors that connectors were answered with.",
            "kind",
            &tally.connector_errors,
        )
    }

    fn encode_peers(&self, page: &mut Page<'_>) -> fmt::Result {
        let Snapshot { status, tally, .. } = &self.0;
        page.gauge("pd_peers", "Peers that are connected.", None, status.peers.into())?;
        if tally.sends {
            let count = |state| status.receivers.iter().filter(|receiver| receiver.state == state).count() as u64;
            page.gauges(
                "pd_receivers",
                "Receivers that were named at start, by whether they can be sent to.",
                None,
                "state",
                &ReceiverState::ALL.map(|state| (state.as_str(), count(state))),
            )?;
        }
        page.counter("pd_handshakes", "Handshakes that went well.", None, tally.handshakes)?;
        page.counters("pd_peer_failures", "Peers refused, lost or not reached.", "kind", &tally.peer_failures)?;
        page.counter(
            "pd_unexpected_messages",
            "Messages of peers that made no sense where they came.",
            None,
            tally.unexpected_messages,
        )
    }

    fn encode_slots(&self, page: &mut Page<'_>) -> fmt::Result {
        let Snapshot { status, tally, .. } = &self.0;
        let mut states = vec![("available", status.slots_free.into()), ("reserved", status.slots_reserved.into())];
        states.extend([
            ("ready_held", status.slots_held.saturating_sub(status.slots_parked).into()),
            ("ready_idle", status.slots_ready.saturating_sub(status.slots_held).into()),
        ]);
        if tally.receives {
            states.push(("quarantined", status.slots_quarantined.into()));
        }
        if tally.sends {
            states.push(("parked", status.slots_parked.into()));
        }
        page.gauges(
            "pd_slots",
            "Slots by state; those that are ready_idle are available too.",
            None,
            "state",
            &states,
        )?;
        page.gauge(
            "pd_slots_max",
            "Slots that the buffer has, or can have once grown.",
            None,
            status.slot_count.into(),
        )?;
        if tally.receives {
            page.gauge("pd_leases", "Leases that connectors have not released.", None, status.leases.into())?;
            page.counter(
                "pd_slots_quarantined",
                "Slots that were quarantined: given up while their writer might still write.",
                None,
                tally.slots_quarantined,
            )?;
            page.counter(
                "pd_slots_unquarantined",
                "Quarantined slots that were freed: their writer is known to have stopped.",
                None,
                tally.slots_unquarantined,
            )?;
        }
        Ok(())
    }

    fn encode_buffer(&self, page: &mut Page<'_>) -> fmt::Result {
        let Snapshot { status, tally, .. } = &self.0;
        let buffer = &status.buffer;
        let bytes = Some(Unit::Bytes);
        let states = [("used", buffer.used_bytes), ("free", buffer.free_bytes)];
        page.gauges("pd_buffer", "Bytes of the pd_buffer by state.", bytes.clone(), "state", &states)?;
        page.gauge("pd_buffer_max", "How long the pd_buffer can become.", bytes.clone(), buffer.len_max_bytes)?;
        page.gauge("pd_buffer_largest_free", "Longest free range of the pd_buffer.", bytes, buffer.largest_free_bytes)?;
        page.gauge("pd_buffer_free_ranges", "Free ranges of the pd_buffer.", None, buffer.free_range_count)?;
        let groups: Vec<String> = (0..buffer.chunks_fit.len()).map(|group| group.to_string()).collect();
        let fits: Vec<(&str, u64)> = groups.iter().map(String::as_str).zip(buffer.chunks_fit.iter().copied()).collect();
        let help = "Whole chunks that fit now with nothing let go, by group of layers.";
        page.gauges("pd_buffer_chunks_fit", help, None, "group", &fits)?;
        let results = ByKind::from([("ok", tally.growths), ("failed", tally.growths_failed)]);
        page.counters("pd_buffer_growths", "Steps by which a lazy pd_buffer grew, or could not.", "result", &results)
    }
}

#[derive(Debug)]
struct Process(ProcessUsage);

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let ProcessUsage { cpu_s, resident_bytes, open_fds, start_time_s } = self.0;
        let mut page = Page { encoder };
        let seconds = || Some(Unit::Seconds);
        let help = "Processor time, user and system together.";
        page.describe("process_cpu", help, seconds(), MetricType::Counter, |metric| {
            metric.encode_counter(&cpu_s, NO_EXEMPLAR)
        })?;
        let help = "Resident memory, the pages of the pd_buffer included.";
        page.gauge("process_resident_memory", help, Some(Unit::Bytes), resident_bytes)?;
        page.gauge("process_open_fds", "Open file descriptors.", None, open_fds)?;
        let help = "When the process started, since 1970.";
        page.describe("process_start_time", help, seconds(), MetricType::Gauge, |metric| {
            metric.encode_gauge(&start_time_s)
        })
    }
}

const NO_EXEMPLAR: Option<&Exemplar<NoLabelSet, f64>> = None;

/// Writes one metric after the other. Counters are named without the `_total` that the library adds, and everything
/// without its unit.
struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    fn describe(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        kind: MetricType,
        write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        write(&mut self.encoder.encode_descriptor(name, help, unit.as_ref(), kind)?)
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
        self.describe(name, help, unit, MetricType::Gauge, |metric| metric.encode_gauge(&value))
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        label: &str,
        values: &[(&str, u64)],
    ) -> fmt::Result {
        self.describe(name, help, unit, MetricType::Gauge, |metric| {
            values.iter().try_for_each(|(of, value)| metric.encode_family(&[(label, *of)])?.encode_gauge(value))
        })
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
        self.describe(name, help, unit, MetricType::Counter, |metric| metric.encode_counter(&value, NO_EXEMPLAR))
    }

    fn counters(&mut self, name: &str, help: &str, label: &str, values: &ByKind) -> fmt::Result {
        self.describe(name, help, None, MetricType::Counter, |metric| {
            values
                .iter()
                .try_for_each(|(of, value)| metric.encode_family(&[(label, *of)])?.encode_counter(value, NO_EXEMPLAR))
        })
    }

    fn histograms<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        mut values: impl Iterator<Item = (&'a &'static str, &'a DurationCounts)>,
    ) -> fmt::Result {
        self.describe(name, help, Some(Unit::Seconds), MetricType::Histogram, |metric| {
            values.try_for_each(|(of, times)| {
                let labels = [(label, *of)];
                let mut metric = metric.encode_family(&labels)?;
                metric.encode_histogram::<NoLabelSet>(times.sum_s(), times.count(), &times.buckets(), None)
            })
        })
    }
}
