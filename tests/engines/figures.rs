//! What a GPU is asked for in figures.

use super::support::memory::MemoryKind;
use super::*;

/// One line of JSON for each length of a chunk: writes by the engine into another process's buffer, and the same copies
/// between two buffers of this process, by turns.
pub(super) fn gpu_writes_against_copies(kind: EngineKind) {
    const KIB: u64 = 1024;
    let (rounds, shapes) = if support::gpu::is_real() {
        (20, vec![(256 * KIB, 2048), (2048 * KIB, 1024), (8192 * KIB, 512), (32768 * KIB, 128)])
    } else {
        (3, vec![(64 * KIB, 8), (256 * KIB, 4)])
    };
    let mut lines = String::new();
    for (chunk_bytes, chunk_count) in shapes {
        let len_bytes = chunk_bytes * chunk_count;
        let mut receiver = Receiver::start(&HIDDEN, kind, len_bytes, chunk_bytes);
        let mut sender = Sender::start(kind, len_bytes, chunk_bytes);
        let connection = sender.connect(&mut receiver);
        let own = MemoryKind::Gpu.allocate(len_bytes, len_bytes);
        let Memory::Cuda(cuda) = &*own else { panic!("it is on a GPU") };
        let stream = CopyStream::new(cuda.device().clone()).unwrap();
        // Backwards, so that no two chunks are one copy.
        let chunk = |at: u64| copy(at * chunk_bytes, (chunk_count - 1 - at) * chunk_bytes, chunk_bytes);
        let copies: Vec<ByteCopy> = (0..chunk_count).map(chunk).collect();
        let mut pairs = Vec::new();
        for round in 0..rounds + 2 {
            let started = Instant::now();
            let (from, to) = (CopyEnd::Memory(sender.memory.clone()), CopyEnd::Memory(own.clone()));
            let mut batch = CopyBatch::new(stream.clone(), from, to);
            for copy in &copies {
                batch.push(copy.local_offset, copy.remote_offset, copy.len_bytes).unwrap();
            }
            batch.seal().unwrap();
            while !batch.is_done().unwrap() {
                std::hint::spin_loop();
            }
            let copied = started.elapsed();
            let started = Instant::now();
            sender.ship(connection, &copies).unwrap();
            if round >= 2 {
                pairs.push((copied, started.elapsed()));
            }
        }
        let mut ratios: Vec<f64> =
            pairs.iter().map(|(copied, wrote)| copied.as_secs_f64() / wrote.as_secs_f64()).collect();
        ratios.sort_by(f64::total_cmp);
        let mut wrote: Vec<f64> = pairs.iter().map(|(_, wrote)| wrote.as_secs_f64()).collect();
        wrote.sort_by(f64::total_cmp);
        let (ratio, seconds) = (ratios[ratios.len() / 2], wrote[wrote.len() / 2]);
        lines += &format!(
            "{}\n",
            serde_json::json!({
                "chunk_bytes": chunk_bytes, "chunks": chunk_count, "rounds": rounds, "gb_per_s": len_bytes as f64 / seconds / 1e9,
                "of_copy": ratio, "least_of_copy": ratios[0]
            })
        );
    }
    match std::env::var("PD_TEST_REPORT") {
        Ok(path) => std::fs::write(path, lines).unwrap(),
        Err(_) => eprint!("{lines}"),
    }
}
