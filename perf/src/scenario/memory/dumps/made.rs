//! Memory that is made up, for where no dumps of guests are at hand and a look must be short: its shares are chosen, not
//! found, so it shows that everything works and little of how good it is.
//!
//! | huge pages, of eight | boot | settled | upgraded | tight |
//! |---|---|---|---|---|
//! | 2 | files, the same in all guests | | | |
//! | 1 | | files | | |
//! | 1 | | files | other files | the guest's own |
//! | 1 | every other page files, the rest its own | | | |
//! | 1 | its own | | | |
//! | 1 | | its own | | |
//! | 1 | | half of it zeros, the rest not in memory | | |

use std::path::Path;

use anyhow::Result;

use super::store::{ABSENT, Map, PAGE, Set, Writer, ZERO};

/// Pages of a huge page.
const HUGE: u64 = 512;
/// The states, in the order of time.
const STATES: [&str; 4] = ["boot", "settled", "upgraded", "tight"];

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Absent,
    Zero,
    /// Of this number in all guests.
    File(u64),
    /// Of this guest alone.
    Own(u64),
}

/// Makes a set of guests of so many MiB.
pub(crate) fn make(folder: &Path, guests: u64, mib: u64) -> Result<Set> {
    let pages = mib << 8;
    let mut writer = Writer::new(folder)?;
    for guest in 0..guests {
        for state in STATES {
            let map: Result<Map> = (0..pages)
                .map(|page| match content(state, guest, page, pages) {
                    Content::Absent => Ok(ABSENT),
                    Content::Zero => Ok(ZERO),
                    Content::File(number) => writer.page(&random(number)),
                    Content::Own(number) => writer.page(&random(number | (guest + 1) << 40)),
                })
                .collect();
            writer.put(&format!("guest{guest:02}"), state, &map?)?;
        }
    }
    let from = format!("{guests} guests of {mib} MiB, made up");
    writer.finish(from, mib << 20)
}

fn content(state: &str, guest: u64, page: u64, pages: u64) -> Content {
    // The same file lies elsewhere in each guest.
    let file = Content::File((page + guest * 7 * HUGE) % pages);
    let own = Content::Own(page);
    match (page / HUGE % 8, state) {
        (0 | 1, _) => file,
        (2 | 3 | 6 | 7, "boot") => Content::Absent,
        (3, "upgraded") => Content::File(pages + page),
        (3, "tight") => Content::Own(pages + page),
        (2 | 3, _) => file,
        (4, _) if page.is_multiple_of(2) => file,
        (7, _) if page % HUGE < HUGE / 2 => Content::Zero,
        (7, _) => Content::Absent,
        _ => own,
    }
}

/// xorshift64*, as far as it goes.
fn random(seed: u64) -> [u8; PAGE] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = [0; PAGE];
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        *word = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
    }
    page
}

#[cfg(test)]
mod tests {
    use super::super::store::Reader;
    use super::*;
    use crate::scenario::memory::can_merge::Maps;

    #[test]
    fn guests_have_files_in_common_and_pages_of_their_own() {
        let folder = std::env::temp_dir().join(format!("berth-perf-made-{}", std::process::id()));
        make(&folder, 2, 16).unwrap();
        let reader = Reader::open(&folder).unwrap();
        let maps = Maps::read(&reader).unwrap();
        let of = |state: &str| {
            let key = |guest: &str| (guest.to_owned(), state.to_owned());
            [key("guest00"), key("guest01")]
        };
        let (boot, settled) = (maps.pages(&of("boot")), maps.pages(&of("settled")));
        assert!(boot > 0 && settled > boot, "{boot}, {settled}");
        assert!(maps.pages(&of("upgraded")) > 0);
        let apart = maps.apart(&of("settled"), 0);
        assert!(apart.iter().flatten().filter(|apart| **apart).count() >= 2);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
