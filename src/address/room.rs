//! Room for a request where there is none: which of the ranges that can be spared to give back, and no more than help.

use super::ranges::TakenRange;
use super::space::Space;
use super::{AddressError, AddressRange};

/// What a request got, and what was given back for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MadeRoom {
    /// The ranges taken, in the order in which they were asked for.
    pub ranges: Vec<AddressRange>,
    /// Which of the spare ranges were given back, by their positions, lowest first.
    pub given_back: Vec<usize>,
}

/// A range that was given back on trial.
enum OnTrial {
    /// A slot of the grid.
    Slot(AddressRange),
    /// Any other range, and where the free bytes start and end that it became part of.
    Odd { start: u64, taken: TakenRange, merged: (u64, u64) },
}

/// Spare ranges that were looked at, and how many of them, from the first on, are given back on trial.
#[derive(Default)]
struct Trial {
    spare: Vec<(usize, AddressRange)>,
    given_back: Vec<OnTrial>,
}

impl Space {
    /// Takes what `take` appends, in bytes before `end_bytes`. Where there is no room, gives spare ranges back, all of
    /// which are taken, until there is:
    ///
    /// - as few as will do, the first of `spare` before the others;
    /// - of these only those whose bytes the request gets, unless it finds no place without the others;
    /// - none when all of them are too few, or when what would be taken ends beyond `end_bytes`.
    ///
    /// Less than `least_bytes` free are too few in any case. Tries as often as the logarithm of the number of ranges looked
    /// at; where more room can mean less (a request of several lengths is placed greedily), "as few as will do" means that
    /// one fewer would not.
    pub(super) fn make_room(
        &mut self,
        least_bytes: u64,
        end_bytes: u64,
        spare: impl Iterator<Item = AddressRange>,
        take: impl Fn(&mut Self, &mut Vec<AddressRange>) -> Result<(), AddressError>,
    ) -> Result<MadeRoom, AddressError> {
        let known = self.no_room_from_bytes;
        let mut ranges = Vec::new();
        let mut trial = Trial::default();
        let mut refusal = take(self, &mut ranges).err();
        if matches!(refusal, Some(AddressError::OutOfMemory { .. })) {
            refusal = self.find_room(&mut trial, least_bytes, spare.enumerate(), &take, &mut ranges).err();
        }
        if refusal.is_none() && ranges.iter().any(|range| range.end() > end_bytes) {
            self.free_batch(&ranges).expect("just taken");
            refusal = Some(self.out_of_memory(ranges.len(), least_bytes));
        }
        if let Some(refusal) = refusal {
            self.set_given_back(&mut trial, 0);
            self.no_room_from_bytes = known;
            return Err(refusal);
        }
        Ok(MadeRoom { ranges, given_back: trial.spare.iter().map(|&(position, _)| position).collect() })
    }

    /// As [`make_room`](Self::make_room), once it is known that nothing less will do. Leaves in `trial` what is given back.
    fn find_room(
        &mut self,
        trial: &mut Trial,
        least_bytes: u64,
        mut spare: impl Iterator<Item = (usize, AddressRange)>,
        take: &impl Fn(&mut Self, &mut Vec<AddressRange>) -> Result<(), AddressError>,
        ranges: &mut Vec<AddressRange>,
    ) -> Result<(), AddressError> {
        // So many are too few.
        let mut too_few = 0;
        let mut more = 1;
        loop {
            let before = trial.spare.len();
            while trial.spare.len() - before < more || self.free_bytes() < least_bytes {
                if self.free_bytes() < least_bytes {
                    too_few = trial.spare.len();
                }
                let Some(next) = spare.next() else { break };
                trial.spare.push(next);
                self.give_back_all(trial);
            }
            if trial.spare.len() == before {
                return Err(self.out_of_memory(0, least_bytes));
            }
            if take(self, ranges).is_ok() {
                break;
            }
            too_few = trial.spare.len();
            more *= 2;
        }
        let mut enough = trial.spare.len();
        while enough - too_few > 1 {
            self.free_batch(ranges).expect("just taken");
            ranges.clear();
            let count = too_few + (enough - too_few) / 2;
            self.set_given_back(trial, count);
            if take(self, ranges).is_ok() {
                enough = count;
            } else {
                too_few = count;
                self.set_given_back(trial, enough);
                take(self, ranges)?;
            }
        }
        trial.spare.truncate(enough);
        self.keep_what_does_not_help(trial, take, ranges)
    }

    /// Takes spare ranges again in whose bytes nothing was placed.
    fn keep_what_does_not_help(
        &mut self,
        trial: &mut Trial,
        take: &impl Fn(&mut Self, &mut Vec<AddressRange>) -> Result<(), AddressError>,
        ranges: &mut Vec<AddressRange>,
    ) -> Result<(), AddressError> {
        loop {
            let mut placed = ranges.clone();
            placed.sort_unstable();
            let helps = |&(_, spare): &(usize, AddressRange)| {
                let after = placed.partition_point(|range| range.end() <= spare.start);
                placed.get(after).is_some_and(|range| range.start < spare.end())
            };
            let helping: Vec<(usize, AddressRange)> = trial.spare.iter().copied().filter(helps).collect();
            if helping.len() == trial.spare.len() {
                return Ok(());
            }
            self.free_batch(ranges).expect("just taken");
            ranges.clear();
            self.set_given_back(trial, 0);
            let all = std::mem::replace(&mut trial.spare, helping);
            self.give_back_all(trial);
            if take(self, ranges).is_err() {
                self.set_given_back(trial, 0);
                trial.spare = all;
                self.give_back_all(trial);
                return take(self, ranges);
            }
        }
    }

    fn give_back_all(&mut self, trial: &mut Trial) {
        let count = trial.spare.len();
        self.set_given_back(trial, count);
    }

    /// Gives back so many of the spare ranges, and takes the others again. Nothing else was taken or freed meanwhile.
    fn set_given_back(&mut self, trial: &mut Trial, count: usize) {
        while trial.given_back.len() > count {
            if let Some(on_trial) = trial.given_back.pop() {
                self.take_again(on_trial);
            }
        }
        for &(_, range) in &trial.spare[trial.given_back.len()..count] {
            trial.given_back.push(self.give_back_on_trial(range));
        }
    }

    fn give_back_on_trial(&mut self, range: AddressRange) -> OnTrial {
        self.no_room_from_bytes = u64::MAX;
        if self.slots.give_back(range) {
            self.used_bytes -= range.len_bytes;
            return OnTrial::Slot(range);
        }
        let taken = self.ranges.remove_taken(range.start, range.len_bytes).expect("a spare range is taken");
        self.used_bytes -= taken.end - range.start;
        let merged = self.ranges.absorb_neighbours(range.start, taken.end);
        self.insert_free(merged.0, merged.1);
        OnTrial::Odd { start: range.start, taken, merged }
    }

    /// Takes again what was given back last of all that is given back. What is free follows from what is taken, so it lies
    /// where it lay then.
    fn take_again(&mut self, on_trial: OnTrial) {
        match on_trial {
            OnTrial::Slot(range) => {
                self.slots.undo_give_back(range);
                self.used_bytes += range.len_bytes;
            }
            OnTrial::Odd { start, taken, merged } => {
                let whole = self.slots.within(merged.0, merged.1);
                let (first, last) = match whole.is_empty() {
                    true => (merged.1, merged.1),
                    false => (self.slots.start_of(whole.start), self.slots.start_of(whole.end)),
                };
                for (start, end) in [(merged.0, first), (last, merged.1)].into_iter().filter(|(start, end)| start < end)
                {
                    self.ranges.remove_free(start, end);
                }
                self.slots.lend(whole);
                self.ranges.insert_free(merged.0, start);
                self.ranges.insert_free(taken.end, merged.1);
                self.used_bytes += taken.end - start;
                self.ranges.insert_taken(start, taken);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLOT: u64 = 8;

    /// Used bytes, free slots, free ranges, and what is taken.
    type Picture = (u64, Vec<bool>, Vec<(u64, u64)>, Vec<(u64, TakenRange)>);

    /// Everything that can be seen of a space, in order.
    fn picture(space: &Space) -> Picture {
        let slots = (0..space.slots.count()).map(|slot| space.slots.is_free(slot)).collect();
        let mut taken: Vec<(u64, TakenRange)> = space.ranges.taken().collect();
        taken.sort_unstable_by_key(|(start, _)| *start);
        (space.used_bytes, slots, space.ranges.free_descending(), taken)
    }

    /// What to take.
    #[derive(Debug, Clone)]
    enum Ask {
        Each(Vec<u64>),
        SlotsBelow(usize, u64),
    }

    impl Ask {
        fn take(&self, space: &mut Space, out: &mut Vec<AddressRange>) -> Result<(), AddressError> {
            match self {
                Self::Each(lens_bytes) => space.allocate_each(lens_bytes, out),
                Self::SlotsBelow(count, end_bytes) => space.allocate_slots_below(*count, *end_bytes, out),
            }
        }

        fn least_bytes(&self) -> u64 {
            match self {
                Self::Each(lens_bytes) => lens_bytes.iter().sum(),
                Self::SlotsBelow(count, _) => *count as u64 * SLOT,
            }
        }
    }

    fn ask() -> impl Strategy<Value = Ask> {
        let uniform = (1u64..=SLOT, 1usize..6).prop_map(|(len, count)| Ask::Each(vec![len; count]));
        prop_oneof![
            2 => uniform,
            3 => prop::collection::vec(prop_oneof![Just(SLOT), 1u64..20], 1..6).prop_map(Ask::Each),
            2 => (1usize..5, 0u64..120).prop_map(|(count, end)| Ask::SlotsBelow(count, end)),
        ]
    }

    proptest! {
        #[test]
        fn gives_back_the_first_that_will_do_and_otherwise_nothing(
            alignment in prop_oneof![Just(1), Just(2), Just(4)],
            len_bytes in 0u64..120,
            lens in prop::collection::vec((prop_oneof![Just(SLOT), 1u64..20], 0u8..3, any::<u32>()), 0..40),
            ask in ask(),
            end_bytes in prop_oneof![Just(u64::MAX), 0u64..120],
        ) {
            // Broken in production: a request that cannot be served empties the cache, or one that can takes the chunks
            // that were used last.
            let mut space = Space::new(len_bytes, alignment, SLOT).unwrap();
            let live: Vec<(AddressRange, u8, u32)> =
                lens.iter().filter_map(|&(len, fate, order)| Some((space.allocate(len).ok()?, fate, order))).collect();
            let mut spare: Vec<(u32, AddressRange)> = Vec::new();
            for (range, fate, order) in live {
                match fate {
                    0 => space.free(range).unwrap(),
                    1 => spare.push((order, range)),
                    _ => {}
                }
            }
            spare.sort_unstable();
            let spare: Vec<AddressRange> = spare.into_iter().map(|(_, range)| range).collect();
            let fits = |given_back: &[AddressRange]| {
                let mut space = space.clone();
                space.free_batch(given_back).unwrap();
                ask.take(&mut space, &mut Vec::new()).is_ok()
            };
            let mut after = space.clone();
            let made = after.make_room(ask.least_bytes(), end_bytes, spare.iter().copied(), |space, out| {
                ask.take(space, out)
            });
            prop_assert_eq!(after.check(), Ok(()));
            let Ok(MadeRoom { ranges, given_back }) = made else {
                prop_assert_eq!(picture(&after), picture(&space));
                prop_assert!(end_bytes < u64::MAX || !fits(&spare), "there was room");
                return Ok(());
            };
            prop_assert!(ranges.iter().all(|range| range.end() <= end_bytes));
            let fewest = (0..=spare.len()).find(|&count| fits(&spare[..count])).unwrap();
            let least = |count: usize| count == 0 || !fits(&spare[..count - 1]);
            let bounds: Vec<usize> = (0..=spare.len()).filter(|&count| fits(&spare[..count]) && least(count)).collect();
            let within = |bound: usize| given_back.iter().all(|&position| position < bound);
            prop_assert!(bounds.iter().any(|&bound| within(bound)), "{given_back:?} of {bounds:?}");
            if !matches!(&ask, Ask::Each(lens) if lens.iter().any(|len| *len != lens[0])) {
                prop_assert!(within(fewest), "{given_back:?} of {fewest}");
            }
            let helps = |range: &AddressRange| {
                ranges.iter().any(|taken| taken.start < range.end() && range.start < taken.end())
            };
            let given_back: Vec<AddressRange> = given_back.iter().map(|&position| spare[position]).collect();
            let helping: Vec<AddressRange> = given_back.iter().copied().filter(helps).collect();
            prop_assert!(helping == given_back || !fits(&helping), "{given_back:?} for {ranges:?}");
            // What was not given back is still taken, and only that.
            let kept: Vec<AddressRange> =
                spare.iter().copied().filter(|range| !given_back.contains(range)).chain(ranges).collect();
            prop_assert!(after.free_batch(&kept).is_ok());
        }
    }
}
