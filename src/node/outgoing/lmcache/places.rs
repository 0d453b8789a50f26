//! What an LMCache receiver's answer to an allocation says: a page for each chunk that it has not.

use std::collections::BTreeSet;

use crate::wire::message::AllocResponse;

/// Where the chunks of a request go: to a page, or nowhere because they are said to be there.
pub(super) type Places = Vec<Option<u32>>;

/// An answer that places nothing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoPlaces {
    /// It says that it has no room, or that something is wrong with the request. It keeps nothing of it.
    Refused,
    /// It does not add up.
    Malformed,
}

/// Where an answer places `count` chunks.
pub(super) fn places(count: usize, page_count: u64, response: &AllocResponse) -> Result<Places, NoPlaces> {
    let pages = &response.remote_indexes;
    if !pages.is_empty() && pages.iter().all(|page| *page < 0) {
        return Err(NoPlaces::Refused);
    }
    let there: BTreeSet<usize> = response.already_sent_indexes.iter().map(|&index| index as usize).collect();
    let in_range = there.last().is_none_or(|&last| last < count);
    let different: BTreeSet<&i64> = pages.iter().collect();
    if !in_range || there.len() + pages.len() != count || different.len() != pages.len() {
        return Err(NoPlaces::Malformed);
    }
    let mut granted = pages.iter();
    let place = |index| {
        if there.contains(&index) {
            return Ok(None);
        }
        let page = granted.next().and_then(|&page| u32::try_from(page).ok());
        page.filter(|&page| u64::from(page) < page_count).map(Some).ok_or(NoPlaces::Malformed)
    };
    (0..count).map(place).collect()
}
