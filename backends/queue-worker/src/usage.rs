//! Wrong usage as one line: clap's own messages are paragraphs.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Reads the command line; where there is nothing to run, prints why and gives the exit code: 0 after
/// `--help` and `--version`, 2 after wrong usage.
pub fn parse_args<T: Parser>() -> Result<T, ExitCode> {
    T::try_parse().map_err(|error| match one_line(&error) {
        None => {
            print!("{error}");
            ExitCode::SUCCESS
        }
        Some(line) => {
            eprintln!("{}: {line}", T::command().get_name());
            ExitCode::from(2)
        }
    })
}

/// What was wrong, and the nearest word that is known; none where nothing was.
fn one_line(error: &clap::Error) -> Option<String> {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return None;
    }
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    let mut line = first.trim_start_matches("error: ").to_owned();
    if line.ends_with(':') {
        // "the following required arguments were not provided:" and their names below.
        for name in lines.take_while(|line| !line.is_empty()) {
            line.push(' ');
            line.push_str(name);
        }
    }
    if let Some(ContextValue::Strings(values)) = error.get(ContextKind::ValidValue)
        && !values.is_empty()
    {
        line.push_str(&format!(" (expected: {})", values.join(", ")));
    }
    if let Some(ContextValue::String(near)) = error.get(ContextKind::SuggestedArg) {
        line.push_str(&format!(" (nearest: '{near}')"));
    }
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser)]
    struct Args {
        #[arg(long)]
        file: String,
        #[arg(long, value_parser = ["red", "green"])]
        light: Option<String>,
    }

    fn line(words: &[&str]) -> Option<String> {
        let error = Args::try_parse_from(words).err()?;
        one_line(&error)
    }

    #[test]
    fn usage_is_one_line_with_the_nearest_flag() {
        let text = line(&["x", "--fil=1"]).unwrap();
        assert_eq!(
            text,
            "unexpected argument '--fil' found (nearest: '--file')"
        );
        let text = line(&["x"]).unwrap();
        assert_eq!(
            text,
            "the following required arguments were not provided: --file <FILE>"
        );
        let text = line(&["x", "--file=1", "--light=blue"]).unwrap();
        assert_eq!(
            text,
            "invalid value 'blue' for '--light <LIGHT>' (expected: red, green)"
        );
        assert_eq!(line(&["x", "--help"]), None);
    }
}
