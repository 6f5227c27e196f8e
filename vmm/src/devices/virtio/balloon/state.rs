//! What there is to know of a balloon, in one piece: what a snapshot will hold.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::PAGE;
use super::pages::Blocks;

/// Statistics by tag (virtio 1.2, 5.5.6.4, and what Linux 6.12 adds); sizes are in bytes.
pub const STATS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];

/// What the guest says of its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats([Option<u64>; STATS.len()]);

impl Stats {
    /// One statistic, by its tag.
    #[cfg(test)]
    pub(crate) fn of(tag: u16, value: u64) -> Self {
        let mut stats = Self::default();
        stats.set(tag, value);
        stats
    }

    pub(super) fn set(&mut self, tag: u16, value: u64) {
        if let Some(stat) = self.0.get_mut(usize::from(tag)) {
            *stat = Some(value);
        }
    }

    /// Those that the guest told, by name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let named = STATS.into_iter().zip(self.0);
        named.filter_map(|(name, value)| Some((name, value?)))
    }
}

/// All of a balloon but its rings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Pages that the host wants.
    pub target_pages: u32,
    /// Pages that the guest says it gave.
    pub actual_pages: u32,
    /// What the guest's free pages hold.
    pub poison_val: u32,
    /// What it last told of its memory.
    pub stats: Option<Stats>,
    /// Pages of huge pages that it gave.
    pub(super) blocks: Blocks,
}

impl State {
    /// Configuration space (virtio 1.2, 5.5.4); `free_page_hint_cmd_id` is that of no hinting.
    pub(super) fn config(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let fields = [self.target_pages, self.actual_pages, 0, self.poison_val];
        for (to, field) in bytes.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// Takes what the guest wrote there: `actual` and `poison_val` are its own.
    pub(super) fn set_config(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = self.config();
        let at = |i| usize::try_from(offset).ok()?.checked_add(i);
        for (i, byte) in data.iter().enumerate() {
            if let Some(to) = at(i).and_then(|at| bytes.get_mut(at)) {
                *to = *byte;
            }
        }
        let [_, actual, _, poison] = [0, 4, 8, 12].map(|at| {
            let mut field = [0; 4];
            field.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(field)
        });
        self.actual_pages = actual;
        self.poison_val = poison;
    }

    /// A reset: the guest has all its memory, and nothing is known of it.
    pub(super) fn reset(&mut self) {
        *self = Self {
            target_pages: self.target_pages,
            ..Self::default()
        };
    }

    /// Bytes that the host wants.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.target_pages) * PAGE
    }

    /// Bytes that the guest says it gave.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.actual_pages) * PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_writes_its_own_fields_only() {
        let mut state = State {
            target_pages: 7,
            ..State::default()
        };
        state.set_config(0, &[0xff; 16]);
        assert_eq!((state.target_pages, state.actual_pages), (7, u32::MAX));
        state.set_config(4, &5u32.to_le_bytes());
        state.set_config(12, &[0xaa; 4]);
        state.set_config(15, &[0; 8]);
        state.set_config(u64::MAX, &[1; 8]);
        assert_eq!((state.actual_pages, state.poison_val), (5, 0x00aa_aaaa));
        assert_eq!(state.config()[..8], [7, 0, 0, 0, 5, 0, 0, 0]);
        state.reset();
        assert_eq!((state.target_bytes(), state.actual_bytes()), (7 * PAGE, 0));
    }

    #[test]
    fn it_is_written_and_read_back() {
        let mut state = State {
            target_pages: 3,
            stats: Some(Stats::default()),
            ..State::default()
        };
        let mut whole = Vec::new();
        state.blocks.fill(&(0x1000..0x3000), 2 << 20, &mut whole);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<State>(&text).unwrap(), state);
    }
}
