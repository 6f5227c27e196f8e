//! Arguments to configuration, run, exit code; nothing else.

use std::process::ExitCode;
use std::sync::Arc;

use berth_net::args::Args;
use berth_net::config::{Config, PortConfig};
use berth_net::net_device::NetDevice;
use berth_net::port::tap::Tap;

const NAME: &str = "berth-net";

fn main() -> ExitCode {
    let args = match berth_queue_worker::parse_args::<Args>() {
        Ok(args) => args,
        Err(code) => return code,
    };
    if args.print_capabilities {
        println!("{}", serde_json::json!({ "type": "net" }));
        return ExitCode::SUCCESS;
    }
    berth_queue_worker::init_logging();
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => {
            berth_queue_worker::fail(NAME, &error);
            return ExitCode::from(2);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => berth_queue_worker::fail(NAME, &*error),
    }
}

fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let pairs = config.settings.identity.pairs;
    let tap = match &config.port {
        PortConfig::Tap { name, create } => {
            Tap::open(name, pairs, *create, config.settings.identity.mtu)?
        }
        PortConfig::Fds(fds) => Tap::from_fds(fds)?,
    };
    let mut settings = config.settings;
    let carries = tap.mtu().and_then(|mtu| u16::try_from(mtu).ok());
    settings.identity.mtu = settings.identity.mtu.or(carries);
    let device = NetDevice::new(settings, Arc::new(tap));
    berth_queue_worker::run(&config.daemon, device)?;
    Ok(())
}
