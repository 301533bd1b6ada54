//! What is outside the cluster: the bank's gateway and the issuer of tokens, at the addresses they have in the lab too.
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use strata_lab::{LabError, Result, WORLD_GATEWAY, WORLD_ISSUER};

use crate::BRIDGE;
use crate::kubectl::output;

/// Processes of this machine, on addresses of the bridge all nodes hang on. They end with it.
#[derive(Debug)]
pub(crate) struct World {
    echo: PathBuf,
    keys: String,
    processes: Vec<Child>,
}

impl World {
    pub(crate) fn start(folder: &Path) -> Result<World> {
        for address in [WORLD_GATEWAY, WORLD_ISSUER] {
            let mut ip = Command::new("ip");
            ip.args(["addr", "replace", &format!("{address}/32"), "dev", BRIDGE]);
            output(ip, "ip addr", None)?;
        }
        let own = std::env::current_exe().map_err(|source| LabError::Io { what: "own path".into(), source })?;
        // Beside the program, or beside the folder of test programs.
        let beside =
            own.ancestors().skip(1).take(2).map(|folder| folder.join("strata-echo")).find(|path| path.is_file());
        let echo = beside.ok_or_else(|| LabError::Machine("strata-echo is not built (make build)".into()))?;
        let keys = folder.join("issuer").display().to_string();
        let mut world = World { echo, keys: keys.clone(), processes: Vec::new() };
        let (http, tcp, udp) =
            (format!("{WORLD_GATEWAY}:8080"), format!("{WORLD_GATEWAY}:9000"), format!("{WORLD_GATEWAY}:9001"));
        world.run(&["serve", "--name", "gateway", "--http", &http, "--tcp", &tcp, "--udp", &udp])?;
        world.run(&["jwks", "--keys", &keys, "--listen", &format!("{WORLD_ISSUER}:9090")])?;
        world.check_running()?;
        Ok(world)
    }

    /// Whoever cannot listen, because an earlier run that was killed left somebody there, ends at once.
    fn check_running(&mut self) -> Result<()> {
        std::thread::sleep(Duration::from_millis(300));
        for process in &mut self.processes {
            if let Ok(Some(status)) = process.try_wait() {
                let reason =
                    format!("{} outside the cluster ended ({status}): does another one run?", self.echo.display());
                return Err(LabError::Machine(reason));
            }
        }
        Ok(())
    }

    fn run(&mut self, args: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.echo);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|source| LabError::Io { what: "strata-echo".into(), source })?;
        self.processes.push(child);
        Ok(())
    }

    /// `strata-echo call` from outside the cluster.
    pub(crate) fn call(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.echo);
        command.arg("call").args(args);
        output(command, "strata-echo call", None)
    }

    pub(crate) fn token(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.echo);
        command.args([&["token", "--keys", &self.keys], args].concat());
        Ok(output(command, "strata-echo token", None)?.trim().to_owned())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
        for address in [WORLD_GATEWAY, WORLD_ISSUER] {
            let mut ip = Command::new("ip");
            ip.args(["addr", "del", &format!("{address}/32"), "dev", BRIDGE]);
            // The bridge may be gone with the cluster.
            let _ = output(ip, "ip addr", None);
        }
    }
}
