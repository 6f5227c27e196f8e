//! The cells of the table: what is measured, and what we want to reach.
#![forbid(unsafe_code)]

use anyhow::{Result, bail};

use crate::backing::Backing;
use crate::target::{Direction, Load, Wait};

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

    /// Whether it writes to the disk.
    pub fn writes(&self) -> bool {
        self.load.direction == Direction::Write
    }
}

/// The cells whose name has one of `wanted` in it (all without any), of the quick ones only if `only_quick`.
pub fn select(wanted: &[String], only_quick: bool) -> Result<Vec<Cell>> {
    let parts = |name: &str| -> Vec<String> { name.split('-').map(str::to_owned).collect() };
    let matches = |name: &str, want: &str| {
        if CELLS.iter().any(|cell| cell.name() == want) {
            return name == want;
        }
        let (have, want) = (parts(name), parts(want));
        have.windows(want.len()).any(|window| window == want)
    };
    for want in wanted {
        if !CELLS.iter().any(|cell| matches(&cell.name(), want)) {
            let names: Vec<String> = CELLS.iter().map(Cell::name).collect();
            bail!("no cell '{want}'; there are {}", names.join(", "));
        }
    }
    let selected = CELLS.iter().filter(|cell| {
        let name = cell.name();
        (!only_quick || cell.quick)
            && (wanted.is_empty() || wanted.iter().any(|want| matches(&name, want)))
    });
    let selected: Vec<Cell> = selected.copied().collect();
    if selected.is_empty() {
        bail!("--quick has none of these cells");
    }
    Ok(selected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(wanted: &[&str], only_quick: bool) -> Vec<String> {
        let wanted: Vec<String> = wanted.iter().map(|&want| want.to_owned()).collect();
        let cells = select(&wanted, only_quick).unwrap();
        cells.iter().map(Cell::name).collect()
    }

    #[test]
    fn a_cell_is_chosen_by_its_name_or_by_parts_of_it() {
        assert_eq!(
            names(&["zram-randread-4k-qd1"], false),
            ["zram-randread-4k-qd1"]
        );
        assert_eq!(names(&["zram-randread"], false).len(), 5);
        assert_eq!(names(&["qd128"], false).len(), 3);
        assert_eq!(names(&["file"], false).len(), 5);
        assert_eq!(names(&[], true).len(), 4);
        assert_eq!(names(&[], false).len(), CELLS.len());
    }

    #[test]
    fn an_unknown_cell_is_an_error_that_lists_them() {
        let error = select(&["qd2".to_owned()], false).unwrap_err().to_string();
        assert!(error.contains("no cell 'qd2'") && error.contains("zram-randwrite-4k-qd32"));
        assert!(select(&["file".to_owned()], true).is_err());
    }

    #[test]
    fn names_are_unique() {
        let mut all: Vec<String> = CELLS.iter().map(Cell::name).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), CELLS.len());
    }
}
