//! From a request to the driver's command, and from its reply to an answer.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use berth_vmm_api_types::v1 as wire;

use super::http::{Request, Response, Status};
use super::request;
use crate::config::device_wire;
use crate::config::shared_fd::SharedFd;
use crate::tuning::{self, Outcome};
use crate::vhost_user::Kind;
use crate::vm::requests::{Command, Failure, Info, Reply, Resize};
use crate::vm::state::{Action, Refusal};

const ROOT: &str = "/api/v1/";

/// What a request comes to.
#[derive(Debug)]
pub(super) enum Route {
    /// Answered here.
    Answer(Response),
    /// To be asked of the driver.
    Ask(Command),
}

/// Requests that clients know and this VMM does not serve.
const NOT_SERVED: [&str; 13] = [
    "vm.resize-disk",
    "vm.resize-zone",
    "vm.add-device",
    "vm.add-pmem",
    "vm.add-vsock",
    "vm.add-vdpa",
    "vm.add-user-device",
    "vm.snapshot",
    "vm.restore",
    "vm.coredump",
    "vm.nmi",
    "vm.receive-migration",
    "vm.send-migration",
];

/// Finds out what a request wants.
///
/// Descriptors are taken out of the request by the one that has a use for them.
pub(super) fn route(request: &mut Request) -> Route {
    let Some(name) = request.path.strip_prefix(ROOT) else {
        return not_found(&request.path);
    };
    let method = match name {
        "vmm.ping" | "vm.info" | "vm.counters" => "GET",
        "vm.memory-sample" if request.method == "GET" => "GET",
        _ => "PUT",
    };
    let act = |action| Ok(Command::Act(action));
    let command = match name {
        "vmm.ping" if request.method == method => return Route::Answer(ping()),
        "vmm.ping" | "vm.info" => Ok(Command::Info),
        "vm.counters" => Ok(Command::Counters),
        "vmm.shutdown" => Ok(Command::VmmShutdown),
        "vm.create" => create(&request.body),
        "vm.boot" => act(Action::Boot),
        "vm.pause" => act(Action::Pause),
        "vm.resume" => act(Action::Resume),
        "vm.power-button" => act(Action::PowerButton),
        "vm.reboot" => act(Action::Reboot),
        "vm.shutdown" => act(Action::Shutdown),
        "vm.delete" => act(Action::Delete),
        "vm.add-disk" => add_disk(&request.body),
        "vm.add-net" => add_net(&request.body, std::mem::take(&mut request.fds)),
        "vm.add-fs" => add_fs(&request.body),
        "vm.add-generic-vhost-user" => add_generic(&request.body),
        "vm.resize" => resize(&request.body),
        "vm.memory-sample" if method == "GET" => Ok(Command::Tune(tuning::Request::Look)),
        "vm.memory-sample" => hash(&request.body),
        "vm.memory-advice" => advise(&request.body),
        "vm.remove-device" => remove(&request.body),
        _ if NOT_SERVED.contains(&name) => {
            let message = format!("{name} is not supported");
            return error(Status::NotImplemented, &message);
        }
        _ => return not_found(&request.path),
    };
    if request.method != method {
        let message = format!("{} takes {method}, not {}", request.path, request.method);
        return error(Status::BadRequest, &message);
    }
    match command {
        Ok(command) => Route::Ask(command),
        Err(reason) => error(Status::BadRequest, &reason.to_string()),
    }
}

fn create(body: &[u8]) -> Result<Command, request::Error> {
    let config = request::json("VmConfig", body)?;
    Ok(Command::Create(Box::new(request::vm_config(config)?)))
}

// An empty id: the driver chooses one.

fn add_disk(body: &[u8]) -> Result<Command, request::Error> {
    let disk = request::json("DiskConfig", body)?;
    add(Kind::Blk(request::disk_config(&disk, "")?))
}

fn add_net(body: &[u8], fds: Vec<OwnedFd>) -> Result<Command, request::Error> {
    let net = request::json("NetConfig", body)?;
    let fds = fds.into_iter().map(SharedFd::from).collect();
    add(Kind::Net(request::net_config(&net, "", fds)?))
}

fn add_fs(body: &[u8]) -> Result<Command, request::Error> {
    let fs = request::json("FsConfig", body)?;
    add(Kind::Fs(device_wire::fs(&fs, "", "fs")?))
}

fn add_generic(body: &[u8]) -> Result<Command, request::Error> {
    let generic = request::json("GenericVhostUserConfig", body)?;
    let generic = device_wire::generic(&generic, "", "generic_vhost_user")?;
    add(Kind::Generic(generic))
}

fn add(kind: Kind) -> Result<Command, request::Error> {
    Ok(Command::Add(Box::new(kind)))
}

fn remove(body: &[u8]) -> Result<Command, request::Error> {
    let removed: wire::VmRemoveDevice = request::json("VmRemoveDevice", body)?;
    Ok(Command::Remove(removed.id))
}

fn resize(body: &[u8]) -> Result<Command, request::Error> {
    let resize: wire::VmResize = request::json("VmResize", body)?;
    Ok(Command::Resize(Resize {
        vcpus: resize.desired_vcpus,
        ram_bytes: resize.desired_ram,
        balloon_bytes: resize.desired_balloon,
    }))
}

fn advise(body: &[u8]) -> Result<Command, request::Error> {
    let advice = request::json("MemoryAdvice", body)?;
    Ok(Command::Tune(tuning::Request::Advise(advice)))
}

fn hash(body: &[u8]) -> Result<Command, request::Error> {
    let sample = request::json("MemorySample", body)?;
    Ok(Command::Tune(tuning::Request::Hash(sample)))
}

/// The answer for what the driver said.
pub(super) fn answer(reply: Result<Reply, Failure>) -> Response {
    match reply {
        Ok(Reply::Done | Reply::Tuned(Outcome::Advised)) => Response {
            status: Status::NoContent,
            body: None,
        },
        Ok(Reply::Added(device)) => json(&wire::PciDeviceInfo {
            id: device.id,
            bdf: device.bdf,
        }),
        Ok(Reply::Tuned(Outcome::Seen(memory))) => json(&memory),
        Ok(Reply::Tuned(Outcome::Hashed(hashes))) => json(&hashes),
        Ok(Reply::Info(info)) => json(&vm_info(&info)),
        Ok(Reply::Counters(counters)) => json::<wire::VmCounters>(&counters),
        Err(error) => {
            let status = match error {
                Failure::Refused(Refusal::NotCreated) | Failure::NotFound(_) => Status::NotFound,
                Failure::Invalid(_) => Status::BadRequest,
                Failure::Conflict(_) => Status::Conflict,
                Failure::Unsupported(_) => Status::NotImplemented,
                Failure::Forbidden(_) => Status::Forbidden,
                Failure::Refused(Refusal::WrongState { .. }) | Failure::Failed(_) => {
                    Status::InternalServerError
                }
            };
            Response::error(status, &[&error.to_string()])
        }
    }
}

fn not_found(path: &str) -> Route {
    error(Status::NotFound, &format!("there is no {path}"))
}

fn error(status: Status, message: &str) -> Route {
    Route::Answer(Response::error(status, &[message]))
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
        memory_actual_size: {
            let ballooned = info
                .balloon
                .as_ref()
                .map_or(0, |balloon| balloon.actual_bytes);
            info.config.memory.size_bytes.saturating_sub(ballooned)
        },
        balloon: info.balloon.as_ref().map(super::convert::balloon_info),
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
        route(&mut Request {
            method: method.to_owned(),
            path: path.to_owned(),
            keep_alive: true,
            body: Vec::new(),
            fds: Vec::new(),
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
        assert!(matches!(
            routed("PUT", "/api/v1/vm.pause"),
            Route::Ask(Command::Act(Action::Pause))
        ));
        assert!(matches!(
            routed("GET", "/api/v1/vm.info"),
            Route::Ask(Command::Info)
        ));
        assert_eq!(status(routed("GET", "/api/v1/vmm.ping")), Status::Ok);
        assert_eq!(
            status(routed("GET", "/api/v1/vm.pause")),
            Status::BadRequest
        );
        assert_eq!(status(routed("PUT", "/api/v1/vm.fly")), Status::NotFound);
        assert_eq!(status(routed("GET", "/")), Status::NotFound);
        assert_eq!(
            status(routed("PUT", "/api/v1/vmm.ping")),
            Status::BadRequest
        );
        assert_eq!(
            status(routed("PUT", "/api/v1/vm.create")),
            Status::BadRequest
        );
        for name in NOT_SERVED {
            let answered = status(routed("PUT", &format!("/api/v1/{name}")));
            assert_eq!(answered, Status::NotImplemented, "{name}");
        }
    }

    #[test]
    fn refusals_have_cloud_hypervisors_codes() {
        let not_created = answer(Err(Refusal::NotCreated.into()));
        assert_eq!(not_created.status, Status::NotFound);
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
