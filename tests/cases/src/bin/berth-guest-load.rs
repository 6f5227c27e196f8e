//! Load for a file system in a guest: threads that write, read, truncate and sync files of checksummed
//! blocks, past the page cache and through it, and notice every error and every wrong byte.
//!
//! Each thread has a file and a model of it (`blocks`) of its own. When the stop file appears all threads
//! end, and every block of every file is read back past the page cache.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use berth_tests_cases::blocks::{self, BLOCK, Model, Random};
use clap::Parser;

const O_DIRECT: i32 = 0x4000;
/// Blocks of the longest operation.
const MOST: usize = 16;

/// Writes and checks files until a stop file appears; exit code 1 for any error or wrong byte
#[derive(Debug, Parser)]
#[command(
    name = "berth-guest-load",
    version,
    after_help = "Example: berth-guest-load --dir /mnt --stop /tmp/enough"
)]
struct Args {
    /// Where its files go
    #[arg(long)]
    dir: PathBuf,
    /// Ends when this file exists
    #[arg(long)]
    stop: PathBuf,
    /// Files, and threads
    #[arg(long, default_value_t = 4)]
    files: usize,
    /// Blocks of 4 KiB in each file
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(32..))]
    blocks: u32,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(count) => {
            println!("berth-guest-load: {count} operations, all well");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("berth-guest-load: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(args: &Args) -> Result<u64> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..args.files)
            .map(|n| {
                scope.spawn(move || {
                    let path = args.dir.join(format!("load-{n}"));
                    let mut load = Load::new(&path, n as u64, args.blocks as usize)?;
                    load.until(&args.stop)
                        .with_context(|| path.display().to_string())
                })
            })
            .collect();
        let mut count = 0;
        for thread in threads {
            count += thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(count)
    })
}

/// One file, open past the page cache and through it.
struct Load {
    direct: File,
    cached: File,
    model: Model,
    random: Random,
    /// Room for an operation at a multiple of the block size.
    buffer: Vec<u8>,
    aligned: usize,
}

impl Load {
    fn new(path: &Path, number: u64, count: usize) -> Result<Self> {
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(flags)
                .open(path)
                .with_context(|| path.display().to_string())
        };
        let cached = open(0)?;
        cached.set_len(0)?;
        cached.set_len((count * BLOCK) as u64)?;
        let buffer = vec![0; (MOST + 1) * BLOCK];
        let aligned = buffer.as_ptr().align_offset(BLOCK);
        Ok(Self {
            direct: open(O_DIRECT)?,
            cached,
            model: Model::new(number << 32, count),
            random: Random::new(number + 1),
            buffer,
            aligned,
        })
    }

    /// Works until `stop` exists, then reads everything; operations made.
    fn until(&mut self, stop: &Path) -> Result<u64> {
        let mut count = 0;
        while !stop.exists() {
            self.step()?;
            count += 1;
        }
        self.cached.sync_all().context("sync")?;
        for first in (0..self.model.len()).step_by(MOST) {
            self.read(first..(first + MOST).min(self.model.len()), true)?;
        }
        Ok(count)
    }

    /// One operation.
    fn step(&mut self) -> Result<()> {
        let count = 1 + usize::try_from(self.random.below(MOST as u64))?;
        let first = usize::try_from(self.random.below((self.model.len() - count) as u64))?;
        let (blocks, past_cache) = (first..first + count, self.random.below(3) > 0);
        match self.random.below(32) {
            0 => self.truncate(first),
            1 | 2 => self.cached.sync_data().context("fdatasync"),
            3..=10 => self.read(blocks, past_cache),
            _ => self.write(blocks, past_cache),
        }
    }

    fn file(&self, past_cache: bool) -> &File {
        if past_cache {
            &self.direct
        } else {
            &self.cached
        }
    }

    fn write(&mut self, blocks: std::ops::Range<usize>, past_cache: bool) -> Result<()> {
        let sequence = self.model.begin_write(blocks.clone());
        let end = self.aligned + blocks.len() * BLOCK;
        let bytes = &mut self.buffer[self.aligned..end];
        for (block, part) in blocks.clone().zip(bytes.chunks_exact_mut(BLOCK)) {
            blocks::fill(part, self.model.id(block), sequence);
        }
        self.file(past_cache)
            .write_all_at(
                &self.buffer[self.aligned..end],
                (blocks.start * BLOCK) as u64,
            )
            .with_context(|| format!("write of blocks {blocks:?}, direct: {past_cache}"))?;
        self.model.acknowledge(blocks);
        Ok(())
    }

    fn read(&mut self, blocks: std::ops::Range<usize>, past_cache: bool) -> Result<()> {
        let end = self.aligned + blocks.len() * BLOCK;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer[self.aligned..end].fill(0xa5);
        let read = self.file(past_cache).read_exact_at(
            &mut buffer[self.aligned..end],
            (blocks.start * BLOCK) as u64,
        );
        self.buffer = buffer;
        read.with_context(|| format!("read of blocks {blocks:?}, direct: {past_cache}"))?;
        let bytes = &self.buffer[self.aligned..end];
        for (block, part) in blocks.zip(bytes.chunks_exact(BLOCK)) {
            let wrong = self.model.check(block, part);
            ensure!(wrong.is_ok(), "{wrong:?}, direct: {past_cache}");
        }
        Ok(())
    }

    /// Cuts the file at `first` and makes it as long as it was: zeroes from there on.
    fn truncate(&mut self, first: usize) -> Result<()> {
        let blocks = first..self.model.len();
        self.model.begin_zero(blocks.clone());
        self.cached
            .set_len((first * BLOCK) as u64)
            .context("truncate")?;
        self.cached
            .set_len((blocks.end * BLOCK) as u64)
            .context("extend")?;
        self.model.acknowledge(blocks);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goes with its test, also when that fails.
    struct Directory(PathBuf);

    impl Directory {
        fn new() -> Self {
            let name = format!("berth-guest-load-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&path).expect("made");
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_that_is_what_was_written_is_well_and_one_block_of_before_is_not() {
        let directory = Directory::new();
        let dir = &directory.0;
        let mut load = Load::new(&dir.join("file"), 3, 64).expect("a file");
        for _ in 0..400 {
            load.step().expect("all well");
        }
        load.write(5..6, true).expect("written");
        let mut stale = vec![0; BLOCK];
        load.cached
            .read_exact_at(&mut stale, 5 * BLOCK as u64)
            .expect("read");
        load.write(5..6, true).expect("written");
        let stop = dir.join("stop");
        File::create(&stop).expect("made");
        assert_eq!(load.until(&stop).expect("all well"), 0);
        load.cached
            .write_all_at(&stale, 5 * BLOCK as u64)
            .expect("written");
        let error = load.until(&stop).expect_err("a stale block");
        assert!(error.to_string().contains("block 5 holds"), "{error:#}");
    }
}
