//! Checksums of any number of bytes, a slice at a time and in turn: the thread that sums does other things between two
//! slices, and a small job does not wait for all of a large one.

use std::collections::VecDeque;

use crate::buffer::{BufferError, Memory};
use crate::ids::{Checksum, Summing};

/// What one turn sums at most: as many bytes as one poll of the local engine copies, a fraction of a millisecond.
pub(super) const SLICE_LEN_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// What a range costs besides its bytes, in bytes: a turn with thousands of tiny ranges is bounded as well.
const RANGE_COST_BYTES: u64 = 4096;

/// Bytes of the buffer that have one checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SumRange {
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
}

/// One checksum for each range of a job, in order.
pub(super) type Sums = Vec<Result<Checksum, BufferError>>;

/// Jobs that have bytes left to sum. `T` says what each job is for.
#[derive(Debug)]
pub(super) struct SumQueue<T> {
    jobs: VecDeque<Job<T>>,
}

#[derive(Debug)]
struct Job<T> {
    purpose: T,
    ranges: Vec<SumRange>,
    /// Of the ranges that are summed.
    sums: Sums,
    /// Of the next range: how much of it is summed, and the sum.
    done_bytes: u64,
    summing: Summing,
}

impl<T> Job<T> {
    fn is_done(&self) -> bool {
        self.sums.len() == self.ranges.len()
    }

    /// Sums the next slice.
    fn advance(&mut self, memory: &Memory) {
        let mut budget_bytes = SLICE_LEN_BYTES_MAX;
        while budget_bytes > 0
            && let Some(&SumRange { offset_bytes, len_bytes }) = self.ranges.get(self.sums.len())
        {
            let slice_bytes = (len_bytes - self.done_bytes).min(budget_bytes);
            budget_bytes = budget_bytes.saturating_sub(slice_bytes.max(RANGE_COST_BYTES));
            let summed = memory.sum(offset_bytes + self.done_bytes, slice_bytes, &mut self.summing);
            self.done_bytes += slice_bytes;
            if summed.is_ok() && self.done_bytes < len_bytes {
                continue;
            }
            let summing = std::mem::take(&mut self.summing);
            self.done_bytes = 0;
            self.sums.push(summed.map(|()| summing.finish()));
        }
    }
}

impl<T> SumQueue<T> {
    pub(super) const fn new() -> Self {
        Self { jobs: VecDeque::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    pub(super) fn push(&mut self, purpose: T, ranges: Vec<SumRange>) {
        let sums = Vec::with_capacity(ranges.len());
        self.jobs.push_back(Job { purpose, ranges, sums, done_bytes: 0, summing: Summing::default() });
    }

    /// Sums one slice of the job whose turn it is. Returns the job if that was its last.
    pub(super) fn advance(&mut self, memory: &Memory) -> Option<(T, Sums)> {
        let mut job = self.jobs.pop_front()?;
        job.advance(memory);
        if job.is_done() {
            return Some((job.purpose, job.sums));
        }
        self.jobs.push_back(job);
        None
    }

    /// Takes out the job that is for this, if it has not been summed yet.
    pub(super) fn remove(&mut self, is_it: impl Fn(&T) -> bool) -> Option<T> {
        let at = self.jobs.iter().position(|job| is_it(&job.purpose))?;
        self.jobs.remove(at).map(|job| job.purpose)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::HostMemory;

    const RANGE_LARGE: SumRange = SumRange { offset_bytes: 3, len_bytes: 2 * SLICE_LEN_BYTES_MAX + 1 };

    fn memory() -> (Memory, Vec<u8>) {
        let bytes: Vec<u8> = (0..3 * SLICE_LEN_BYTES_MAX).map(|at| (at * 7 + at / 251) as u8).collect();
        let memory = Memory::Host(HostMemory::allocate(bytes.len() as u64).unwrap());
        memory.write(0, &bytes).unwrap();
        (memory, bytes)
    }

    /// What ends, each with the turn in which it does.
    fn play(queue: &mut SumQueue<&'static str>, memory: &Memory) -> Vec<(u32, &'static str, Sums)> {
        let mut ended = Vec::new();
        for turn in 1.. {
            ended.extend(queue.advance(memory).map(|(purpose, sums)| (turn, purpose, sums)));
            if queue.is_empty() {
                break;
            }
        }
        ended
    }

    #[test]
    fn slices_sum_to_what_the_whole_does_and_what_cannot_be_read_fails_alone() {
        // Broken in production: every chunk longer than a slice is taken for damaged; or one bad range fails its neighbours.
        let (memory, bytes) = memory();
        let mut queue = SumQueue::new();
        let empty = SumRange { offset_bytes: 9, len_bytes: 0 };
        let short = SumRange { offset_bytes: 100, len_bytes: 5 };
        let outside = SumRange { offset_bytes: SLICE_LEN_BYTES_MAX, len_bytes: 3 * SLICE_LEN_BYTES_MAX };
        queue.push("all", vec![RANGE_LARGE, empty, outside, short]);
        let ended = play(&mut queue, &memory);
        let [(_, "all", sums)] = &ended[..] else { panic!("{ended:?}") };
        let whole = |range: SumRange| {
            let start = range.offset_bytes as usize;
            Checksum::of(&bytes[start..start + range.len_bytes as usize])
        };
        let [Ok(large), Ok(nothing), Err(_), Ok(last)] = &sums[..] else { panic!("{sums:?}") };
        assert_eq!((*large, *nothing, *last), (whole(RANGE_LARGE), whole(empty), whole(short)));
    }

    #[test]
    fn a_small_job_waits_for_a_slice_of_each_other_and_a_turn_is_bounded() {
        // Broken in production: one request of gigabytes keeps everybody else's commits waiting, and the engine with them.
        let (memory, _) = memory();
        let mut queue = SumQueue::new();
        queue.push("large", vec![RANGE_LARGE]);
        queue.push("as large", vec![RANGE_LARGE]);
        queue.push("many", vec![SumRange { offset_bytes: 0, len_bytes: 1 }; 2500]);
        queue.push("small", vec![SumRange { offset_bytes: 0, len_bytes: 1 }]);
        queue.push("given up", vec![RANGE_LARGE]);
        assert_eq!(queue.remove(|purpose| *purpose == "given up"), Some("given up"));
        let ended = play(&mut queue, &memory);
        let order: Vec<_> = ended.iter().map(|(turn, purpose, _)| (*turn, *purpose)).collect();
        assert_eq!(order, [(4, "small"), (8, "large"), (9, "as large"), (10, "many")]);
        assert_eq!(queue.remove(|_| true), None);
    }
}
