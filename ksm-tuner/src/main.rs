//! Entry point of `berth-tuner`: arguments, log, one of the commands, exit code.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use berth_tuner::args::{Args, AskArgs, Command, ExplainArgs, RunArgs, WatchArgs};
use berth_tuner::config::Config;
use berth_tuner::report::{Explained, Status, explanation, table};
use berth_tuner::run::{Options, Question, ask, control_path, run};
use clap::Parser;

fn main() -> ExitCode {
    // Prints help, version or what is wrong, and ends with 0 or 2.
    let args = Args::parse();
    let result = match args.command {
        Command::Run(args) => daemon(args),
        Command::Status(args) => status(&args),
        Command::Watch(args) => watch(&args),
        Command::Explain(args) => explain(&args),
        Command::Defaults => print(&Config::default_file()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nowhere to say it, nothing to do about it.
            let _ = writeln!(
                io::stderr(),
                "berth-tuner: {}",
                berth_tuner::chain(error.as_ref())
            );
            ExitCode::FAILURE
        }
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn daemon(args: RunArgs) -> Outcome {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    run(Options {
        config: args.config,
        vms: args.vms,
        run_dir: args.run_dir,
        dry_run: args.dry_run,
        metrics_socket: args.metrics_socket,
        record: args.record,
    })?;
    Ok(())
}

/// What could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("no berth-tuner answers on {}", .0.display())]
struct NoTuner(std::path::PathBuf, #[source] io::Error);

fn asked(args: &AskArgs, question: &Question) -> Result<String, NoTuner> {
    ask(&args.run_dir, question).map_err(|error| NoTuner(control_path(&args.run_dir), error))
}

fn status(args: &AskArgs) -> Outcome {
    let text = asked(args, &Question::Status)?;
    if args.json {
        return print(&text);
    }
    let status: Status = serde_json::from_str(&text)?;
    print(&table(&status))
}

fn watch(args: &WatchArgs) -> Outcome {
    let clear = io::stdout().is_terminal() && !args.ask.json;
    let mut left = args.count;
    loop {
        if clear {
            // Clears the screen and goes to its corner.
            print("\x1b[2J\x1b[H")?;
        }
        status(&args.ask)?;
        left = left.map(|left| left.saturating_sub(1));
        if left == Some(0) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(args.every_ms));
    }
}

fn explain(args: &ExplainArgs) -> Outcome {
    let text = asked(&args.ask, &Question::Explain(args.count))?;
    if args.ask.json {
        return print(&text);
    }
    let explained: Vec<Explained> = serde_json::from_str(&text)?;
    if explained.is_empty() {
        return print("nothing was decided yet: nothing has changed since it started\n");
    }
    print(&explained.iter().map(explanation).collect::<String>())
}

/// To standard output; a reader that has gone is no error.
fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}
