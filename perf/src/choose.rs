//! Which scenarios and cells a command line means.
#![forbid(unsafe_code)]

use std::fmt;

use anyhow::Result;

use crate::args::RunArgs;
use crate::peers::{PEERS, unknown};
use crate::scenario::{ALL, Cell, Entry};

/// A command line that cannot be meant: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A scenario with those of its cells that were chosen.
#[derive(Debug)]
pub struct Chosen {
    /// Which.
    pub entry: &'static Entry,
    /// At least one.
    pub cells: Vec<Cell>,
    /// It was named: that it cannot run is an error.
    pub named: bool,
}

/// What `run` is to run.
pub fn choose(args: &RunArgs) -> Result<Vec<Chosen>> {
    let scenarios: Vec<&str> = ALL.iter().map(|entry| entry.name).collect();
    for name in args.scenarios.iter().chain(&args.without) {
        if !scenarios.contains(&name.as_str()) {
            return Err(Usage(unknown("scenario", name, &scenarios)).into());
        }
    }
    check_peers(args)?;
    let mut chosen = Vec::new();
    for entry in ALL {
        let named = args.scenarios.iter().any(|name| name == entry.name);
        let unwanted = args.without.iter().any(|name| name == entry.name);
        if named || (args.scenarios.is_empty() && !unwanted) {
            let cells = cells((entry.cells)(), &args.cell, args.quick);
            chosen.push(Chosen {
                entry,
                cells,
                named,
            });
        }
    }
    for want in &args.cell {
        let all: Vec<Cell> = chosen.iter().flat_map(|one| (one.entry.cells)()).collect();
        if cells(all.clone(), std::slice::from_ref(want), false).is_empty() {
            let names: Vec<&str> = all.iter().map(|cell| cell.name.as_str()).collect();
            return Err(Usage(unknown("cell", want, &names)).into());
        }
    }
    chosen.retain(|one| !one.cells.is_empty());
    if chosen.is_empty() {
        return Err(Usage("--quick has none of these cells".to_owned()).into());
    }
    Ok(chosen)
}

fn check_peers(args: &RunArgs) -> Result<()> {
    let peers: Vec<&str> = PEERS.iter().map(|peer| peer.name).collect();
    let against = args.against.iter().flatten();
    let named = args.peer.iter().map(|(name, _)| name);
    for name in against.chain(named) {
        if name != "none" && !peers.contains(&name.as_str()) {
            return Err(Usage(unknown("peer", name, &peers)).into());
        }
    }
    Ok(())
}

/// Those whose name has one of `wanted` in it (all without any), of the quick ones only if `quick`.
fn cells(all: Vec<Cell>, wanted: &[String], quick: bool) -> Vec<Cell> {
    let names: Vec<String> = all.iter().map(|cell| cell.name.clone()).collect();
    let matches = |name: &str, want: &String| {
        if names.contains(want) {
            return name == want;
        }
        let have: Vec<&str> = name.split('-').collect();
        let want: Vec<&str> = want.split('-').collect();
        have.windows(want.len()).any(|window| window == want)
    };
    let chosen = |cell: &Cell| {
        (!quick || cell.quick)
            && (wanted.is_empty() || wanted.iter().any(|want| matches(&cell.name, want)))
    };
    all.into_iter().filter(chosen).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(wanted: &[&str], quick: bool) -> Vec<String> {
        let all = [
            "zram-read-qd1",
            "zram-read-qd128",
            "file-read-qd1",
            "to-tap-64",
        ];
        let all = all.map(|name| Cell::new(name, name)).into_iter();
        let all = all.map(|cell| {
            if cell.name.contains("qd1") {
                cell.quick()
            } else {
                cell
            }
        });
        let wanted: Vec<String> = wanted.iter().map(|&want| want.to_owned()).collect();
        let cells = cells(all.collect(), &wanted, quick);
        cells.into_iter().map(|cell| cell.name).collect()
    }

    #[test]
    fn a_cell_is_chosen_by_its_name_or_by_parts_of_it() {
        assert_eq!(names(&["zram-read-qd1"], false), ["zram-read-qd1"]);
        assert_eq!(names(&["qd1"], false), ["zram-read-qd1", "file-read-qd1"]);
        assert_eq!(names(&["zram-read"], false).len(), 2);
        assert_eq!(
            names(&["64", "file"], false),
            ["file-read-qd1", "to-tap-64"]
        );
        assert_eq!(names(&[], false).len(), 4);
        assert_eq!(names(&[], true).len(), 3);
        assert!(names(&["qd2"], false).is_empty());
    }
}
