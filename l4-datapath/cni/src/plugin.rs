//! The commands.
use serde_json::{Value, json};

use crate::input::{Config, Environment, invalid};
use crate::protocol::{Add, Check, Failure, Request, Response};
use crate::{SUPPORTED, Version, client, code, output};

/// What the process prints and how it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// JSON for standard output; None where the specification wants nothing.
    pub stdout: Option<Value>,
    pub success: bool,
}

/// Runs the command of `environment` on the network configuration `input`.
pub fn run(environment: &dyn Fn(&str) -> Option<String>, input: &str) -> Outcome {
    let environment = Environment(environment);
    let config = Config::read(input);
    let version = config.as_ref().map(|config| config.raw_version().to_owned()).unwrap_or_default();
    match environment.command().and_then(|command| execute(&command, &environment, &config?)) {
        Ok(stdout) => Outcome { stdout, success: true },
        Err(failure) => Outcome { stdout: Some(output::failed(&version, &failure)), success: false },
    }
}

fn execute(command: &str, environment: &Environment<'_>, config: &Config) -> Result<Option<Value>, Failure> {
    if command == "VERSION" {
        return Ok(Some(version(config)));
    }
    if !["ADD", "DEL", "CHECK", "GC", "STATUS"].contains(&command) {
        return Err(Failure::new(code::INVALID_ENVIRONMENT, "invalid environment variable CNI_COMMAND")
            .because(format!("{command:?} is none of ADD, DEL, CHECK, GC, STATUS, VERSION")));
    }
    let version = config.version()?;
    config.check()?;
    if matches!(command, "GC" | "STATUS") && version < Version::V1_1_0 {
        return Err(Failure::new(code::INCOMPATIBLE_VERSION, "incompatible CNI version")
            .because(format!("cniVersion {version} has no {command}, it came with 1.1.0")));
    }
    match command {
        "ADD" => add(environment, config, version).map(Some),
        "DEL" => ask(config, &Request::Del { attachment: environment.attachment()? }).map(|_| None),
        "CHECK" => check(environment, config).map(|()| None),
        "GC" => gc(config).map(|()| None),
        _ => status(config).map(|()| None),
    }
}

fn version(config: &Config) -> Value {
    let asked = Some(config.raw_version()).filter(|version| !version.is_empty());
    let supported = SUPPORTED.map(Version::as_str);
    json!({"cniVersion": asked.unwrap_or(Version::V1_1_0.as_str()), "supportedVersions": supported})
}

fn add(environment: &Environment<'_>, config: &Config, version: Version) -> Result<Value, Failure> {
    let (attachment, netns, pod) = (environment.attachment()?, environment.netns()?, environment.pod()?);
    let chained = config.previous.as_ref().map(output::addresses_of).transpose()?;
    let path = netns.display().to_string();
    match ask(config, &Request::Add(Add { attachment, netns, pod, chained }))? {
        Response::Added(added) => Ok(match &config.previous {
            Some(previous) => output::passed_through(version, previous),
            None => output::added(version, &added, &path),
        }),
        other => Err(unexpected(&other)),
    }
}

fn check(environment: &Environment<'_>, config: &Config) -> Result<(), Failure> {
    let (attachment, netns) = (environment.attachment()?, environment.netns()?);
    let Some(previous) = &config.previous else {
        return Err(invalid("prevResult", "is missing, CHECK needs it"));
    };
    let addresses = output::addresses_of(previous)?;
    ask(config, &Request::Check(Check { attachment, netns, addresses })).map(|_| ())
}

fn gc(config: &Config) -> Result<(), Failure> {
    // Without the list nothing may be removed: an absent one is a mistake, an empty one is an order.
    let Some(valid) = config.valid.clone() else {
        return Err(invalid("cni.dev/valid-attachments", "is missing, GC needs it"));
    };
    ask(config, &Request::Gc { valid: valid.into_iter().map(Into::into).collect() }).map(|_| ())
}

fn status(config: &Config) -> Result<(), Failure> {
    match ask(config, &Request::Status) {
        Err(failure) if failure.code == code::TRY_AGAIN_LATER => Err(Failure { code: code::NOT_AVAILABLE, ..failure }),
        other => other.map(|_| ()),
    }
}

fn ask(config: &Config, request: &Request) -> Result<Response, Failure> {
    match client::ask(&config.socket()?, request)? {
        Response::Failed(failure) => Err(failure),
        response => Ok(response),
    }
}

fn unexpected(response: &Response) -> Failure {
    Failure::new(code::IO, "the agent's answer does not fit the request").because(format!("{response:?}"))
}

#[cfg(test)]
mod tests;
