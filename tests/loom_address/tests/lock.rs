//! Every interleaving of two or three threads that share an address manager.

#![allow(clippy::unwrap_used)]

use loom::thread;

use loom_address::address::{AddressError, AddressManager, AddressRange, OwnedRange, Snapshot, Usage};

fn manager() -> AddressManager {
    AddressManager::with_slots(40, 2, 10).unwrap()
}

fn disjoint(a: AddressRange, b: AddressRange) -> bool {
    a.end() <= b.start || b.end() <= a.start
}

/// What every interleaving must end in, when all was given back.
fn all_free(manager: &AddressManager) {
    manager.check().unwrap();
    let Usage { used_bytes, free_range_count, .. } = manager.usage();
    assert_eq!((used_bytes, free_range_count), (0, 1));
}

#[test]
fn three_threads_take_and_give_back() {
    // Broken in production: two requests are granted one slot.
    loom::model(|| {
        let manager = manager();
        let threads: Vec<_> = [10, 4]
            .into_iter()
            .map(|len| {
                let manager = manager.clone();
                thread::spawn(move || {
                    let range = manager.allocate(len).unwrap();
                    manager.free(range).unwrap();
                    manager.allocate(len).unwrap()
                })
            })
            .collect();
        let mine = manager.allocate(10).unwrap();
        let theirs: Vec<AddressRange> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(disjoint(mine, theirs[0]) && disjoint(mine, theirs[1]) && disjoint(theirs[0], theirs[1]));
        manager.check().unwrap();
        manager.free_batch(&[theirs[1], mine, theirs[0]]).unwrap();
        all_free(&manager);
    });
}

#[test]
fn of_two_batches_that_do_not_fit_together_one_is_granted() {
    // Broken in production: two requests get half of what they asked for each, and both wait for ever.
    loom::model(|| {
        let manager = manager();
        let other = {
            let manager = manager.clone();
            thread::spawn(move || manager.allocate_batch(10, 3))
        };
        let mine = manager.allocate_each(&[10, 6, 10]);
        let theirs = other.join().unwrap();
        match (&mine, &theirs) {
            (Ok(granted), Err(AddressError::OutOfMemory { .. }))
            | (Err(AddressError::OutOfMemory { .. }), Ok(granted)) => {
                manager.check().unwrap();
                manager.free_batch(granted).unwrap();
            }
            other => panic!("{other:?}"),
        }
        all_free(&manager);
    });
}

#[test]
fn a_range_freed_by_two_threads_is_freed_once() {
    // Broken in production: a double free goes through, and one slot is handed out twice.
    loom::model(|| {
        let manager = manager();
        let range = manager.allocate(10).unwrap();
        let other = {
            let manager = manager.clone();
            thread::spawn(move || manager.free(range).is_ok())
        };
        let mine = manager.free_batch(&[range]).is_ok();
        assert!(mine != other.join().unwrap());
        all_free(&manager);
    });
}

#[test]
fn a_snapshot_while_another_thread_grows_is_of_one_moment() {
    // Broken in production: status shows more used than there is.
    loom::model(|| {
        let manager = AddressManager::with_slots(10, 2, 10).unwrap();
        let other = {
            let manager = manager.clone();
            thread::spawn(move || {
                manager.grow(10).unwrap();
                manager.allocate(10).unwrap();
                manager.grow(10).unwrap();
            })
        };
        let Snapshot { usage, fits } = manager.snapshot(&[10]);
        assert!(matches!(
            (usage.len_bytes, usage.used_bytes, usage.free_bytes, fits[0]),
            (10, 0, 10, 1) | (20, 0, 20, 2) | (20, 10, 10, 1) | (30, 10, 20, 2)
        ));
        other.join().unwrap();
        manager.check().unwrap();
    });
}

#[test]
fn an_owned_range_dropped_elsewhere_after_its_manager() {
    // Broken in production: shutting down in the wrong order crashes, or frees into nothing.
    loom::model(|| {
        let manager = manager();
        let owned: OwnedRange = manager.allocate_owned(6).unwrap();
        let last = manager.clone();
        let other = thread::spawn(move || {
            assert_eq!(owned.range().len_bytes, 6);
            drop(owned);
        });
        let range = manager.allocate(10).unwrap();
        drop(manager);
        last.free(range).unwrap();
        other.join().unwrap();
        all_free(&last);
    });
}

#[test]
fn nothing_is_handed_out_after_a_close() {
    // Broken in production: a request is granted slots of a buffer that is being torn down.
    loom::model(|| {
        let manager = manager();
        let other = {
            let manager = manager.clone();
            thread::spawn(move || {
                manager.close();
                assert_eq!(manager.allocate(10), Err(AddressError::Closed));
                manager.used_bytes()
            })
        };
        let mine = manager.allocate(10);
        let used_when_closed = other.join().unwrap();
        assert_eq!(manager.used_bytes(), if mine.is_ok() { 10 } else { 0 });
        assert!(used_when_closed <= manager.used_bytes());
        mine.into_iter().for_each(|range| manager.free(range).unwrap());
        all_free(&manager);
    });
}
