//! One page that needs nothing else: no script, no font, no picture from elsewhere.
#![forbid(unsafe_code)]

use super::table;
use crate::results::Results;

/// The page.
pub(super) fn page(results: &Results) -> String {
    let text = escape(&table::text(results));
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><title>berth-perf {}</title><pre>{text}</pre></html>\n",
        escape(&results.date)
    )
}

/// Text that stands for itself in HTML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}
