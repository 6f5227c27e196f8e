//! From a request to the driver's command, and from its reply to an answer.

#![forbid(unsafe_code)]

use berth_vmm_api_types::v1 as wire;

use super::http::{Request, Response, Status};
use crate::vm::requests::{Command, Failure, Info, Reply};
use crate::vm::state::{Action, Refusal};

const ROOT: &str = "/api/v1/";

/// What a request comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Answered here.
    Answer(Response),
    /// To be asked of the driver.
    Ask(Command),
}

/// Finds out what a request wants.
pub(super) fn route(request: &Request) -> Route {
    let Some(name) = request.path.strip_prefix(ROOT) else {
        return not_found(&request.path);
    };
    let (method, route) = match name {
        "vmm.ping" => ("GET", Route::Answer(ping())),
        "vm.info" => ("GET", Route::Ask(Command::Info)),
        "vm.counters" => ("GET", Route::Ask(Command::Counters)),
        "vmm.shutdown" => ("PUT", Route::Ask(Command::VmmShutdown)),
        "vm.boot" => ("PUT", Route::Ask(Command::Act(Action::Boot))),
        "vm.pause" => ("PUT", Route::Ask(Command::Act(Action::Pause))),
        "vm.resume" => ("PUT", Route::Ask(Command::Act(Action::Resume))),
        "vm.power-button" => ("PUT", Route::Ask(Command::Act(Action::PowerButton))),
        "vm.reboot" => ("PUT", Route::Ask(Command::Act(Action::Reboot))),
        "vm.shutdown" => ("PUT", Route::Ask(Command::Act(Action::Shutdown))),
        _ => return not_found(&request.path),
    };
    if request.method == method {
        return route;
    }
    let message = format!("{} takes {method}, not {}", request.path, request.method);
    Route::Answer(Response::error(Status::BadRequest, &[&message]))
}

/// The answer for what the driver said.
pub(super) fn answer(reply: Result<Reply, Failure>) -> Response {
    match reply {
        Ok(Reply::Done) => Response {
            status: Status::NoContent,
            body: None,
        },
        Ok(Reply::Info(info)) => json(&vm_info(&info)),
        Ok(Reply::Counters(counters)) => json::<wire::VmCounters>(&counters),
        Err(error) => {
            let status = match error {
                Failure::Refused(Refusal::NotRunning) => Status::NotFound,
                Failure::Refused(Refusal::WrongState { .. }) | Failure::Failed(_) => {
                    Status::InternalServerError
                }
            };
            Response::error(status, &[&error.to_string()])
        }
    }
}

fn not_found(path: &str) -> Route {
    let message = format!("there is no {path}");
    Route::Answer(Response::error(Status::NotFound, &[&message]))
}

fn ping() -> Response {
    json(&wire::VmmPing {
        build_version: concat!("berth-vmm v", env!("CARGO_PKG_VERSION")).to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id().into(),
        features: vec!["kvm".to_owned()],
    })
}

fn vm_info(info: &Info) -> wire::VmInfo {
    let nodes = info.devices.iter().map(|device| {
        let node = wire::DeviceNode {
            id: device.id.clone(),
            resources: Vec::new(),
            parent: None,
            children: Vec::new(),
            pci_bdf: Some(device.bdf.clone()),
        };
        (device.id.clone(), node)
    });
    wire::VmInfo {
        config: super::convert::vm_config(&info.config, info.pty.as_deref()),
        state: super::convert::vm_state(info.state),
        memory_actual_size: info.config.memory.size_bytes,
        device_tree: (!info.devices.is_empty()).then(|| nodes.collect()),
    }
}

fn json<T: serde::Serialize>(value: &T) -> Response {
    match serde_json::to_string(value) {
        Ok(body) => Response {
            status: Status::Ok,
            body: Some(body),
        },
        Err(error) => Response::error(Status::InternalServerError, &[&error.to_string()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::state::VmState;

    fn routed(method: &str, path: &str) -> Route {
        route(&Request {
            method: method.to_owned(),
            path: path.to_owned(),
            keep_alive: true,
        })
    }

    fn status(route: Route) -> Status {
        match route {
            Route::Answer(response) => response.status,
            Route::Ask(command) => panic!("asks {command:?}"),
        }
    }

    #[test]
    fn requests_are_told_apart_by_path_and_method() {
        assert_eq!(
            routed("PUT", "/api/v1/vm.pause"),
            Route::Ask(Command::Act(Action::Pause))
        );
        assert_eq!(routed("GET", "/api/v1/vm.info"), Route::Ask(Command::Info));
        assert_eq!(status(routed("GET", "/api/v1/vmm.ping")), Status::Ok);
        assert_eq!(
            status(routed("GET", "/api/v1/vm.pause")),
            Status::BadRequest
        );
        assert_eq!(status(routed("PUT", "/api/v1/vm.fly")), Status::NotFound);
        assert_eq!(status(routed("GET", "/")), Status::NotFound);
    }

    #[test]
    fn refusals_have_cloud_hypervisors_codes() {
        let not_running = answer(Err(Refusal::NotRunning.into()));
        assert_eq!(not_running.status, Status::NotFound);
        let wrong = Refusal::WrongState {
            state: VmState::Paused,
            action: Action::Pause,
        };
        let wrong = answer(Err(wrong.into()));
        assert_eq!(wrong.status, Status::InternalServerError);
        let messages: wire::ErrorMessages = serde_json::from_str(&wrong.body.unwrap()).unwrap();
        assert_eq!(messages, ["cannot Pause a guest that is Paused"]);
    }
}
