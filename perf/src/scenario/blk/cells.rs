//! The cells of the table: what is measured, and what we want to reach.
#![forbid(unsafe_code)]

use super::backing::Backing;
use super::target::{Direction, Load, Wait};
use crate::scenario::{self, Bound, Of};

/// One cell.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// What it runs on.
    pub backing: Backing,
    /// The requests.
    pub load: Load,
    /// Share of the limit that `berth-blk` is to reach.
    pub goal: Option<f64>,
    /// Daemon CPU per request that it is to stay below, µs.
    pub cpu_goal_us: Option<f64>,
    /// Part of `--quick`.
    pub quick: bool,
}

const KIB: usize = 1024;

const fn load(direction: Direction, random: bool, block: usize, depth: usize, wait: Wait) -> Load {
    Load {
        direction,
        random,
        block,
        depth,
        wait,
    }
}

const fn read(depth: usize, wait: Wait) -> Load {
    load(Direction::Read, true, 4 * KIB, depth, wait)
}

const fn write(depth: usize) -> Load {
    load(Direction::Write, true, 4 * KIB, depth, Wait::Sleep)
}

const fn sequential(wait: Wait) -> Load {
    load(Direction::Read, false, 128 * KIB, 16, wait)
}

const fn cell(backing: Backing, load: Load, goal: Option<f64>) -> Cell {
    Cell {
        backing,
        load,
        goal,
        cpu_goal_us: None,
        quick: false,
    }
}

const fn quick(cell: Cell) -> Cell {
    Cell {
        quick: true,
        ..cell
    }
}

const fn cpu(cell: Cell, goal_us: f64) -> Cell {
    Cell {
        cpu_goal_us: Some(goal_us),
        ..cell
    }
}

use Backing::{Cache, File, Zram};
use Wait::{Poll, Sleep};

/// All of them, in the order of the table.
const CELLS: [Cell; 17] = [
    quick(cell(Zram, read(1, Sleep), Some(0.45))),
    quick(cell(Zram, read(1, Poll), Some(0.85))),
    cpu(quick(cell(Zram, read(32, Sleep), Some(0.95))), 6.0),
    quick(cell(Zram, read(32, Poll), Some(1.0))),
    cell(Zram, read(128, Sleep), Some(1.0)),
    cell(Zram, write(32), Some(0.97)),
    cell(Zram, sequential(Sleep), Some(0.97)),
    cell(Zram, sequential(Poll), None),
    cell(File, read(1, Sleep), None),
    cell(File, read(32, Sleep), Some(1.0)),
    cell(File, read(128, Sleep), Some(1.0)),
    cell(File, write(32), Some(0.8)),
    cell(File, write(128), Some(0.8)),
    cell(Cache, read(1, Sleep), None),
    cell(Cache, read(1, Poll), None),
    cell(Cache, read(32, Sleep), None),
    cell(Cache, sequential(Sleep), None),
];

impl Cell {
    fn pattern(&self) -> &'static str {
        match (self.load.random, self.load.direction) {
            (true, Direction::Read) => "randread",
            (true, Direction::Write) => "randwrite",
            (false, Direction::Read) => "read",
            (false, Direction::Write) => "write",
        }
    }

    /// What `--cell` knows it by.
    pub fn name(&self) -> String {
        let poll = match self.load.wait {
            Wait::Sleep => "",
            Wait::Poll => "-poll",
        };
        format!(
            "{}-{}-{}k-qd{}{poll}",
            self.backing.name(),
            self.pattern(),
            self.load.block / KIB,
            self.load.depth
        )
    }

    /// For the table.
    pub fn title(&self) -> String {
        let wait = match self.load.wait {
            Wait::Sleep => "sleeps",
            Wait::Poll => "polls",
        };
        format!(
            "{} {}k {} QD{}, client {wait}",
            self.backing.name(),
            self.load.block / KIB,
            self.pattern(),
            self.load.depth
        )
    }

    fn entry(&self) -> scenario::Cell {
        let mut cell = scenario::Cell::new(self.name(), self.title()).rounds(5, 2);
        cell.quick = self.quick;
        if let Some(goal) = self.goal {
            cell = cell.goal("rate", Of::Limit, Bound::AtLeast(goal));
        }
        if let Some(us) = self.cpu_goal_us {
            cell = cell.goal("cpu", Of::Itself, Bound::AtMost(us));
        }
        // Cloud Hypervisor measures at a depth of 128, in a guest; only that depth is called alike.
        match (
            self.backing,
            self.load.random,
            self.load.direction,
            self.load.depth,
        ) {
            (Backing::File, true, Direction::Read, 128) => {
                cell.named("rate", "block_random_read_IOPS")
            }
            (Backing::File, true, Direction::Write, 128) => {
                cell.named("rate", "block_random_write_IOPS")
            }
            _ => cell,
        }
    }

    /// Whether it writes to the disk.
    pub fn writes(&self) -> bool {
        self.load.direction == Direction::Write
    }
}

/// Private memory of an idle daemon of ours.
const IDLE_KIB: f64 = 3072.0;

/// All cells as the engine knows them; the last one watches daemons that have nothing to do.
pub fn all() -> Vec<scenario::Cell> {
    let idle = scenario::Cell::new("idle-4q", "idle, frontend connected, 4 queues of 256")
        .rounds(1, 1)
        .goal("idle_cpu", Of::Itself, Bound::AtMost(0.0))
        .goal("idle_private", Of::Itself, Bound::AtMost(IDLE_KIB));
    CELLS.iter().map(Cell::entry).chain([idle]).collect()
}

/// By its name; none for the one that is idle.
pub fn find(name: &str) -> Option<Cell> {
    CELLS.iter().find(|cell| cell.name() == name).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut all: Vec<String> = CELLS.iter().map(Cell::name).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), CELLS.len());
        assert!(all.iter().all(|name| find(name).is_some()));
    }
}
