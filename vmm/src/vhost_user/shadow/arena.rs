//! Where in a queue's part of the bounce memory the buffers of a request are: runs of pages, lowest first.
//!
//! Lowest first keeps the pages that were ever touched few and warm, and leaves the far end whole for a request that is
//! big. When nothing is in flight the arena is one free run, so that what fits it at all is served in the end.
#![forbid(unsafe_code)]

use super::PAGE;

const BITS: u64 = u64::BITS as u64;

/// Pages that are given out and come back.
#[derive(Debug)]
pub(super) struct Arena {
    /// Address of the first.
    start: u64,
    pages: u64,
    /// A bit for each page, set where it is taken.
    taken: Box<[u64]>,
    /// No page below this one is free.
    first_free: u64,
    /// How many are taken, and how many may be by more than one run.
    in_use: u64,
    most: u64,
}

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    first: u64,
    pages: u64,
}

impl Arena {
    /// All of `[start, start + len)`, both multiples of a page.
    pub(super) fn new(start: u64, len: u64) -> Self {
        let pages = len / PAGE;
        let words = pages.div_ceil(BITS);
        Self {
            start,
            pages,
            taken: vec![0; words as usize].into(),
            first_free: 0,
            in_use: 0,
            most: pages,
        }
    }

    /// The same, of which so many bytes are used at a time and no more, but for one run that is alone: for users that give
    /// everything back by themselves. What is never used takes no memory.
    pub(super) fn sparing(mut self, bytes: u64) -> Self {
        self.most = bytes / PAGE;
        self
    }

    /// The most that there can be room for.
    pub(super) fn bytes(&self) -> u64 {
        self.pages * PAGE
    }

    /// Room for so many bytes in one piece, if there is now.
    pub(super) fn take(&mut self, bytes: u64) -> Option<Run> {
        let pages = bytes.div_ceil(PAGE).max(1);
        if self.in_use > 0 && self.in_use.saturating_add(pages) > self.most {
            return None;
        }
        let mut first = self.next_free(self.first_free)?;
        self.first_free = first;
        loop {
            let end = first.checked_add(pages)?;
            if end > self.pages {
                return None;
            }
            match (first..end).rfind(|&page| self.is_taken(page)) {
                Some(page) => first = self.next_free(page + 1)?,
                None => break,
            }
        }
        let run = Run { first, pages };
        self.mark(run, true);
        Some(run)
    }

    /// Gives back what [`Self::take`] gave.
    pub(super) fn give_back(&mut self, run: Run) {
        self.mark(run, false);
        self.first_free = self.first_free.min(run.first);
    }

    /// Where a run begins.
    pub(super) fn address(&self, run: Run) -> u64 {
        self.start + run.first * PAGE
    }

    fn next_free(&self, from: u64) -> Option<u64> {
        let mut page = from;
        while page < self.pages {
            let word = self.taken[(page / BITS) as usize] >> (page % BITS);
            let free = u64::from(word.trailing_ones());
            // Ones up to the end of the word: the next one says more.
            if free < BITS - page % BITS {
                page += free;
                return (page < self.pages).then_some(page);
            }
            page = (page / BITS + 1) * BITS;
        }
        None
    }

    fn is_taken(&self, page: u64) -> bool {
        self.taken[(page / BITS) as usize] >> (page % BITS) & 1 == 1
    }

    fn mark(&mut self, run: Run, taken: bool) {
        match taken {
            true => self.in_use += run.pages,
            false => self.in_use -= run.pages,
        }
        for page in run.first..run.first + run.pages {
            let bit = 1 << (page % BITS);
            let word = &mut self.taken[(page / BITS) as usize];
            debug_assert!((*word & bit != 0) != taken, "page {page}");
            *word = if taken { *word | bit } else { *word & !bit };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::tests::backend::next;

    #[test]
    fn room_is_given_lowest_first_and_again() {
        let mut arena = Arena::new(0x1_0000, 8 * PAGE);
        let one = arena.take(1).unwrap();
        let two = arena.take(PAGE + 1).unwrap();
        assert_eq!(arena.address(one), 0x1_0000);
        assert_eq!(arena.address(two), 0x1_1000);
        arena.give_back(one);
        let three = arena.take(2 * PAGE).unwrap();
        assert_eq!(arena.address(three), 0x1_3000, "the hole is too small");
        let four = arena.take(PAGE).unwrap();
        assert_eq!(arena.address(four), 0x1_0000);
        assert_eq!(arena.take(4 * PAGE), None);
        let rest = arena.take(3 * PAGE).unwrap();
        assert_eq!(arena.take(1), None);
        for run in [two, three, four, rest] {
            arena.give_back(run);
        }
        assert!(arena.take(8 * PAGE).is_some());
    }

    #[test]
    fn what_can_never_fit_is_not_given() {
        let mut arena = Arena::new(0, 70 * PAGE);
        for bytes in [71 * PAGE, u64::MAX - PAGE, u64::MAX] {
            assert_eq!(arena.take(bytes), None);
        }
        assert!(arena.take(70 * PAGE).is_some());
    }

    #[test]
    fn a_sparing_one_gives_little_at_a_time_and_all_of_it_to_one() {
        let mut arena = Arena::new(0, 64 * PAGE).sparing(8 * PAGE);
        let (one, two) = (arena.take(4 * PAGE).unwrap(), arena.take(4 * PAGE).unwrap());
        assert_eq!(arena.take(1), None);
        arena.give_back(one);
        assert_eq!(arena.take(5 * PAGE), None);
        let three = arena.take(PAGE).unwrap();
        assert_eq!(arena.address(three), 0);
        arena.give_back(two);
        arena.give_back(three);
        assert!(arena.take(64 * PAGE).is_some(), "alone");
    }

    /// Against a list of what was given: nothing overlaps, nothing is lost.
    #[test]
    fn runs_never_overlap_and_all_come_back() {
        let mut random = 0x1234_5678_9abc_def1;
        let mut arena = Arena::new(0, 200 * PAGE);
        let mut given: Vec<Run> = Vec::new();
        for _ in 0..20_000 {
            let roll = next(&mut random);
            if roll.is_multiple_of(2) && !given.is_empty() {
                let at = (roll >> 8) as usize % given.len();
                arena.give_back(given.swap_remove(at));
            } else if let Some(run) = arena.take((roll >> 8) % (20 * PAGE)) {
                assert!(run.first + run.pages <= 200);
                let overlaps = |other: &Run| {
                    run.first < other.first + other.pages && other.first < run.first + run.pages
                };
                assert!(!given.iter().any(overlaps), "{run:?} {given:?}");
                given.push(run);
            }
        }
        for run in given {
            arena.give_back(run);
        }
        assert!(arena.take(200 * PAGE).is_some());
    }
}
