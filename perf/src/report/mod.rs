//! What was measured, for people: tables in the terminal and as Markdown, and one page with pictures.
#![forbid(unsafe_code)]

mod check;
mod page;
mod summary;
mod svg;
mod table;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::args::ReportArgs;
use crate::results::Results;
pub use table::{markdown, text};

/// The page in a run's folder.
pub const PAGE: &str = "report.html";

/// `berth-perf report`.
pub fn run(args: &ReportArgs) -> Result<()> {
    let results = Results::read(&args.run)?;
    if args.check {
        println!("{}", check::check(&results)?);
        return Ok(());
    }
    if let Some(path) = &args.svg {
        fs::write(path, summary::picture(&results))
            .with_context(|| format!("cannot write {}", path.display()))?;
        return Ok(());
    }
    if args.markdown {
        print!("{}\n{}", summary::table(&results), markdown(&results));
        return Ok(());
    }
    print!("{}", text(&results));
    let folder = match args.run.is_dir() {
        true => args.run.as_path(),
        false => args.run.parent().unwrap_or(Path::new(".")),
    };
    let path = args.html.clone().unwrap_or_else(|| folder.join(PAGE));
    write_page(&results, &path)?;
    println!("\nreport: {}", path.display());
    Ok(())
}

/// Writes the page.
pub fn write_page(results: &Results, path: &Path) -> Result<()> {
    fs::write(path, page::page(results)).with_context(|| format!("cannot write {}", path.display()))
}
