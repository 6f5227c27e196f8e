//! Memory of guests on disk: each distinct page once, and for each guest and state which page lies where.
//!
//! ```text
//!   FOLDER/pages.bin      distinct pages that are not all zeros, one after the other
//!   FOLDER/NAME.map       a u32 (little endian) a page: 0 not in memory, 1 zeros, else 2 + index into pages.bin
//!   FOLDER/dumps.json     what there is and where it is from; written last, so that a folder without it is no set
//! ```
//!
//! Pages are told apart by 128 bits of SipHash-1-3, so the numbers in a map are also what is counted when it is asked what
//! can merge.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher13};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// In a map: the page is not in memory.
pub(crate) const ABSENT: u32 = 0;
/// In a map: the page is all zeros.
pub(crate) const ZERO: u32 = 1;
/// In a map: the first page of the file.
pub(crate) const FIRST: u32 = 2;
/// Of this form.
const VERSION: u32 = 1;

/// What a set of dumps is, `dumps.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Set {
    /// Of the form of the files.
    pub(crate) version: u32,
    /// Where it is from, in a few words.
    pub(crate) from: String,
    /// Bytes of memory of each guest that can be merged.
    pub(crate) bytes: u64,
    /// Guests in the order in which they start.
    pub(crate) guests: Vec<Guest>,
}

/// One guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Guest {
    /// Its name.
    pub(crate) name: String,
    /// States in which its memory was written down, in the order of time.
    pub(crate) states: Vec<String>,
}

/// One dump: a number a page.
pub(crate) type Map = Vec<u32>;

/// Writes a set.
#[derive(Debug)]
pub(crate) struct Writer {
    folder: PathBuf,
    pages: BufWriter<File>,
    known: HashMap<u128, u32>,
    guests: Vec<Guest>,
}

impl Writer {
    /// Begins a set in a folder, in place of what may be there.
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let list = folder.join("dumps.json");
        if list.exists() {
            fs::remove_file(&list)?;
        }
        let path = folder.join("pages.bin");
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        Ok(Self {
            folder: folder.to_owned(),
            pages: BufWriter::with_capacity(1 << 20, file),
            known: HashMap::new(),
            guests: Vec::new(),
        })
    }

    /// The number of a page that is in memory.
    pub(crate) fn page(&mut self, page: &[u8]) -> Result<u32> {
        if page.iter().all(|byte| *byte == 0) {
            return Ok(ZERO);
        }
        let mut hasher = SipHasher13::new();
        std::hash::Hasher::write(&mut hasher, page);
        let hash = hasher.finish128().as_u128();
        let next = FIRST + u32::try_from(self.known.len()).context("too many pages")?;
        if let Some(number) = self.known.get(&hash) {
            return Ok(*number);
        }
        self.known.insert(hash, next);
        self.pages.write_all(page)?;
        Ok(next)
    }

    /// Notes a state of a guest.
    pub(crate) fn put(&mut self, guest: &str, state: &str, map: &[u32]) -> Result<()> {
        let path = map_path(&self.folder, guest, state);
        let bytes: Vec<u8> = map.iter().flat_map(|number| number.to_le_bytes()).collect();
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
        let at = match self.guests.iter().position(|known| known.name == guest) {
            Some(at) => at,
            None => {
                self.guests.push(Guest {
                    name: guest.to_owned(),
                    states: Vec::new(),
                });
                self.guests.len() - 1
            }
        };
        self.guests[at].states.push(state.to_owned());
        Ok(())
    }

    /// Ends the set.
    pub(crate) fn finish(mut self, from: String, bytes: u64) -> Result<Set> {
        self.pages.flush()?;
        self.guests.sort_by(|a, b| a.name.cmp(&b.name));
        let set = Set {
            version: VERSION,
            from,
            bytes,
            guests: self.guests,
        };
        let text = serde_json::to_string_pretty(&set)?;
        fs::write(self.folder.join("dumps.json"), text + "\n")?;
        Ok(set)
    }
}

/// Reads a set.
#[derive(Debug)]
pub(crate) struct Reader {
    folder: PathBuf,
    pages: File,
    /// What it is.
    pub(crate) set: Set,
}

impl Reader {
    /// The set of a folder.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("dumps.json");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let set: Set = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        if set.version != VERSION {
            let version = set.version;
            bail!("{}: version {version}, not {VERSION}", path.display());
        }
        let path = folder.join("pages.bin");
        let pages = File::open(&path).with_context(|| path.display().to_string())?;
        Ok(Self {
            folder: folder.to_owned(),
            pages,
            set,
        })
    }

    /// Brings all pages into the host's cache, so that nobody who is measured reads them from a disk or pays for them.
    pub(crate) fn read_ahead(&self) -> Result<()> {
        let mut piece = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            crate::interrupt::check()?;
            match self.pages.read_at(&mut piece, at)? {
                0 => return Ok(()),
                count => at += count as u64,
            }
        }
    }

    /// A state of a guest.
    pub(crate) fn map(&self, guest: &str, state: &str) -> Result<Map> {
        let path = map_path(&self.folder, guest, state);
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        let pages = self.set.bytes / PAGE as u64;
        ensure!(
            bytes.len() as u64 == 4 * pages,
            "{}: {} bytes, not {}",
            path.display(),
            bytes.len(),
            4 * pages
        );
        let numbers = bytes.chunks_exact(4);
        Ok(numbers
            .map(|number| u32::from_le_bytes([number[0], number[1], number[2], number[3]]))
            .collect())
    }

    /// Contents of a page by its number.
    pub(crate) fn page(&self, number: u32, page: &mut [u8; PAGE]) -> Result<()> {
        match number.checked_sub(FIRST) {
            None => page.fill(0),
            Some(index) => self
                .pages
                .read_exact_at(page, u64::from(index) * PAGE as u64)
                .with_context(|| format!("page {index} of {}", self.folder.display()))?,
        }
        Ok(())
    }
}

fn map_path(folder: &Path, guest: &str, state: &str) -> PathBuf {
    folder.join(format!("{guest}-{state}.map"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_pages_are_kept_once_and_come_back() {
        let folder = std::env::temp_dir().join(format!("berth-perf-store-{}", std::process::id()));
        let mut writer = Writer::new(&folder).unwrap();
        let [one, two] = [[1u8; PAGE], [2u8; PAGE]];
        let map: Map = [&one, &two, &one, &[0; PAGE]]
            .map(|page| writer.page(page).unwrap())
            .to_vec();
        assert_eq!(map, [2, 3, 2, ZERO]);
        writer.put("b", "boot", &map).unwrap();
        writer.put("a", "boot", &[ABSENT, 3, 3, 2]).unwrap();
        let set = writer.finish("a test".to_owned(), 4 * PAGE as u64).unwrap();
        assert_eq!(set.guests[0].name, "a");
        let reader = Reader::open(&folder).unwrap();
        assert_eq!(reader.map("b", "boot").unwrap(), map);
        let mut page = [9; PAGE];
        reader.page(3, &mut page).unwrap();
        assert_eq!(page, two);
        reader.page(ZERO, &mut page).unwrap();
        assert_eq!(page, [0; PAGE]);
        assert_eq!(fs::metadata(folder.join("pages.bin")).unwrap().len(), 8192);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_folder_without_a_list_is_no_set() {
        let error = Reader::open(Path::new("/nonexistent")).unwrap_err();
        assert_eq!(format!("{error:#}").lines().count(), 1);
    }
}
