//! Bytes as operations on an address manager and on the naive model of it, which the property test uses, too.

#![no_main]

#[allow(dead_code, unused_imports)]
#[path = "../../src/address/mod.rs"]
mod address;
#[path = "../../tests/support/address_model.rs"]
mod address_model;

use address::{AddressError, AddressManager, AddressRange};
use address_model::{Op, Play};
use libfuzzer_sys::fuzz_target;

/// Most operations in one play; longer ones find nothing that this does not, and slow the search down.
const OPS_MAX: usize = 200;

/// The input, read from the front; past its end there are only zeros.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u64 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        u64::from(*first)
    }

    fn short(&mut self) -> u64 {
        self.byte() << 8 | self.byte()
    }

    fn op(&mut self) -> Op {
        match self.byte() % 11 {
            0 => Op::Allocate(self.byte()),
            1 => Op::AllocateSlot,
            2 => Op::Batch(self.byte() % 64, (self.byte() % 8) as usize),
            3 => Op::BatchSlots((self.byte() % 70) as usize),
            4 => {
                let shape = self.byte();
                let others = (0..shape / 6 % 4).map(|_| self.byte()).collect();
                Op::Each((shape % 6) as usize, others)
            }
            5 => Op::SlotsBelow((self.byte() % 8) as usize, self.short()),
            6 => Op::Free(self.byte() as usize),
            7 => Op::FreeBatch(self.byte() as usize, self.byte() as usize, (self.byte() % 40) as usize),
            8 => Op::FreeBad(self.byte() as usize, self.short(), self.byte()),
            9 => Op::Grow(self.byte()),
            _ => Op::Fill(self.byte()),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes(data);
    let alignment = 1 + bytes.byte() % 20;
    let slots_of = bytes.byte() % 9;
    let len_bytes = bytes.short() % 1500;
    let mut play = Play::new(len_bytes, alignment, slots_of);
    for _ in 0..OPS_MAX {
        if bytes.0.is_empty() {
            break;
        }
        play.step(&bytes.op());
    }
    play.finish();
});
