//! What can merge, counted from the dumps: a page more than one of the same content is a page that can be saved.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;

use super::dumps::store::{ABSENT, FIRST, Map, Reader};

/// Pages of a huge page.
const HUGE: usize = 512;

/// Maps of guests in a state each.
#[derive(Debug)]
pub(super) struct Maps {
    maps: HashMap<(String, String), Map>,
    /// Numbers of pages are below this.
    limit: usize,
}

impl Maps {
    /// All of a set.
    pub(super) fn read(reader: &Reader) -> Result<Self> {
        let mut maps = HashMap::new();
        let mut limit = FIRST;
        for guest in &reader.set.guests {
            for state in &guest.states {
                let map = reader.map(&guest.name, state)?;
                limit = limit.max(map.iter().max().map_or(0, |number| number + 1));
                maps.insert((guest.name.clone(), state.clone()), map);
            }
        }
        Ok(Self {
            maps,
            limit: limit as usize,
        })
    }

    fn count(&self, guests: &[(String, String)]) -> Vec<u32> {
        let mut counts = vec![0; self.limit];
        for number in guests
            .iter()
            .filter_map(|key| self.maps.get(key))
            .flatten()
            .filter(|number| **number != ABSENT)
        {
            counts[*number as usize] += 1;
        }
        counts
    }

    /// Pages that can be saved among guests, each `(name, state)`.
    pub(super) fn pages(&self, guests: &[(String, String)]) -> u64 {
        let counts = self.count(guests);
        counts
            .iter()
            .map(|count| u64::from(count.saturating_sub(1)))
            .sum()
    }

    /// For each guest, which of its huge pages are whole in the dump and have at most so many pages with equals.
    pub(super) fn apart(&self, guests: &[(String, String)], at_most: usize) -> Vec<Vec<bool>> {
        let counts = self.count(guests);
        let is_apart = |pages: &[u32]| {
            let equal = |number: &&u32| counts[**number as usize] > 1;
            pages.iter().all(|number| *number != ABSENT)
                && pages.iter().filter(equal).count() <= at_most
        };
        guests
            .iter()
            .map(|key| {
                let map = self.maps.get(key).map_or(&[][..], Vec::as_slice);
                map.chunks(HUGE).map(is_apart).collect()
            })
            .collect()
    }

    /// Writes down which pages only one guest ever has, and in one place: a byte a number.
    pub(super) fn write_own(&self, reader: &Reader, path: &Path) -> Result<()> {
        let mut owners = vec![0u8; self.limit];
        for guest in &reader.set.guests {
            // How often this guest has it in the state in which it has it most.
            let mut most = vec![0u8; self.limit];
            for state in &guest.states {
                let mut here = vec![0u8; self.limit];
                let map = self.maps.get(&(guest.name.clone(), state.clone()));
                for number in map.into_iter().flatten() {
                    let count = &mut here[*number as usize];
                    *count = count.saturating_add(1);
                }
                for (most, here) in most.iter_mut().zip(here) {
                    *most = (*most).max(here);
                }
            }
            for (owners, most) in owners.iter_mut().zip(most) {
                *owners = owners.saturating_add(most);
            }
        }
        owners[..FIRST as usize].fill(0);
        Ok(std::fs::write(path, owners)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::memory::dumps::store::{Writer, ZERO};

    fn key(guest: &str) -> (String, String) {
        (guest.to_owned(), "boot".to_owned())
    }

    #[test]
    fn all_but_one_of_equal_pages_can_be_saved() {
        let folder = std::env::temp_dir().join(format!("berth-perf-merge-{}", std::process::id()));
        let mut writer = Writer::new(&folder).unwrap();
        let own: Map = (FIRST..FIRST + 512).collect();
        let mut other: Map = vec![ABSENT; 512];
        other[..4].copy_from_slice(&[FIRST, FIRST, ZERO, ZERO]);
        let last = FIRST + 511;
        writer.put("a", "boot", &own).unwrap();
        writer.put("b", "boot", &other).unwrap();
        writer.finish("a test".to_owned(), 512 * 4096).unwrap();
        let reader = Reader::open(&folder).unwrap();
        let maps = Maps::read(&reader).unwrap();
        assert_eq!(maps.pages(&[key("a")]), 0);
        assert_eq!(maps.pages(&[key("b")]), 2);
        assert_eq!(maps.pages(&[key("a"), key("b")]), 3);
        // Not whole in b; in a one page has an equal in b.
        let both = [key("a"), key("b")];
        assert_eq!(maps.apart(&both, 0), [[false], [false]]);
        assert_eq!(maps.apart(&both, 1), [[true], [false]]);
        assert_eq!(maps.apart(&[key("a")], 0), [[true]]);
        let path = folder.join("own");
        maps.write_own(&reader, &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_ne!(bytes[FIRST as usize], 1, "b has it too");
        assert_eq!(bytes[last as usize], 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
