//! The cells of the net table.
#![forbid(unsafe_code)]

use anyhow::{Result, bail};

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

/// The cells whose name begins or ends with one of `wanted`; all without any.
pub(super) fn select(wanted: &[String]) -> Result<Vec<Cell>> {
    let matches = |cell: &Cell, want: &str| {
        let name = cell.name();
        name == want || name.starts_with(&format!("{want}-")) || name.ends_with(&format!("-{want}"))
    };
    for want in wanted {
        if !CELLS.iter().any(|cell| matches(cell, want)) {
            let names: Vec<String> = CELLS.iter().map(Cell::name).collect();
            bail!("no cell '{want}'; there are {}", names.join(", "));
        }
    }
    let chosen = |cell: &&Cell| wanted.is_empty() || wanted.iter().any(|want| matches(cell, want));
    Ok(CELLS.iter().filter(chosen).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_chosen_by_name_way_or_size() {
        let names = |want: &str| -> Vec<String> {
            let cells = select(&[want.to_owned()]).unwrap();
            cells.iter().map(Cell::name).collect()
        };
        assert_eq!(names("to-tap-64"), ["to-tap-64"]);
        assert_eq!(names("to-tap"), ["to-tap-64", "to-tap-1500"]);
        assert_eq!(names("64"), ["to-tap-64", "from-tap-64"]);
        assert!(select(&["65".to_owned()]).is_err());
        assert_eq!(select(&[]).unwrap().len(), CELLS.len());
    }
}
