//! The cells of the net table.
#![forbid(unsafe_code)]

use crate::scenario::{self, Bound, Of};

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The guest transmits.
    ToTap,
    /// The guest receives.
    FromTap,
}

/// One cell.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    /// Which way.
    pub(super) way: Way,
    /// Bytes in a frame, Ethernet header included.
    pub(super) frame: usize,
    /// Share of the limit to reach.
    pub(super) goal: f64,
}

const fn cell(way: Way, frame: usize, goal: f64) -> Cell {
    Cell { way, frame, goal }
}

const CELLS: [Cell; 4] = [
    cell(Way::ToTap, 64, 1.1),
    cell(Way::ToTap, 1500, 1.1),
    cell(Way::FromTap, 64, 1.0),
    cell(Way::FromTap, 1500, 1.0),
];

impl Cell {
    /// What `--cell` knows it by.
    pub(super) fn name(&self) -> String {
        let way = match self.way {
            Way::ToTap => "to-tap",
            Way::FromTap => "from-tap",
        };
        format!("{way}-{}", self.frame)
    }

    /// For the table.
    pub(super) fn title(&self) -> String {
        let way = match self.way {
            Way::ToTap => "guest to tap",
            Way::FromTap => "tap to guest",
        };
        format!("{way}, {} B", self.frame)
    }
}

/// All cells as the engine knows them.
pub(super) fn all() -> Vec<scenario::Cell> {
    let entry = |cell: &Cell| {
        let entry = scenario::Cell::new(cell.name(), cell.title()).rounds(5, 2);
        let entry = entry.goal("rate", Of::Limit, Bound::AtLeast(cell.goal));
        if cell.frame == 64 {
            entry.quick()
        } else {
            entry
        }
    };
    CELLS.iter().map(entry).collect()
}

/// By its name.
pub(super) fn find(name: &str) -> Option<Cell> {
    CELLS.iter().find(|cell| cell.name() == name).copied()
}
