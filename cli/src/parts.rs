//! The parts of a cluster as commands: `coordinator`, `agent` and `worker`.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coordinator::Scope;
use proto::auth::Token;
use proto::ids::NodeName;
use proto::tls::Security;
use tokio::net::UdpSocket;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::args::{AgentArgs, CoordinatorArgs, SecurityArgs, WorkerArgs};
use crate::client::token_path;
use crate::failure::{Failure, chain};
use crate::train::random_bytes;

/// An agent or a command started together with its coordinator waits this long for the token.
const TOKEN_WITHIN: Duration = Duration::from_secs(5);

pub(crate) async fn coordinator(args: CoordinatorArgs) -> Result<u8, Failure> {
    let path = token_path(args.token_file.as_deref())?;
    let token = Token::read_or_create(&path, random_bytes()).map_err(|error| Failure::request(chain(&error)))?;
    let here = std::env::current_dir().map_err(Failure::job)?;
    let options = coordinator::Options {
        store_url: checkpoint_store::normalize_url(&args.store, &here)?,
        listen: args.listen,
        token,
        security: security(&args.security)?,
        host: host_identity(),
        scope: match args.only {
            Some(name) => Scope::Job { name, held: args.held },
            None => Scope::All,
        },
        standby: args.standby,
        allow_single_coordinator: args.allow_single_coordinator,
        admission: !args.no_admission,
        metrics: args.metrics,
    };
    if !args.supervised {
        eprintln!("cairn: coordinator for {} on {}, token file {}", options.store_url, args.listen, path.display());
    }
    let outcome = coordinator::run(options, stop_asked(args.supervised)?).await;
    outcome.map(|()| 0).map_err(|error| Failure::new(error.exit_code(), chain(&error)))
}

pub(crate) async fn agent(args: AgentArgs) -> Result<u8, Failure> {
    let path = token_path(args.token_file.as_deref())?;
    let token = wait_for_token(&path).await?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let node = match args.node {
        Some(node) => node,
        None => default_node_name()?,
    };
    let executable = std::env::current_exe()
        .map_err(|error| Failure::job(format!("cannot find this program's own file: {error}")))?;
    let ring_host = match args.ring_host {
        Some(host) => host,
        None => facing(&args.coordinator).await?,
    };
    let options = agent::Options {
        coordinator: args.coordinator,
        token,
        security: security(&args.security)?,
        node,
        slots: args.slots.unwrap_or(cores as u32),
        cores,
        memory_dir: args.memory,
        memory_budget: args.memory_budget.unwrap_or(0),
        domain: args.domain,
        executable,
        ring_host,
    };
    let (drain, stop) = leave_asked(args.supervised)?;
    let outcome = agent::run(options, drain, stop).await;
    outcome.map(|()| 0).map_err(|error| Failure::new(error.exit_code(), chain(&error)))
}

/// The address of the interface by which this machine reaches its coordinator: that of the first it has a route to.
async fn facing(coordinators: &str) -> Result<IpAddr, Failure> {
    let mut why = String::new();
    for coordinator in coordinators.split(',').map(str::trim) {
        match towards(coordinator).await {
            Ok(host) => return Ok(host),
            // No address at all: the agent says what is wrong with it.
            Err(error) if error.kind() == ErrorKind::InvalidInput => return Ok(Ipv4Addr::LOCALHOST.into()),
            Err(error) => why = format!("{coordinator}: {error}"),
        }
    }
    Err(Failure::job(format!(
        "there is no way to the coordinator ({why}): correct --coordinator, or name an address of this machine that \
         other nodes reach with --ring-host"
    )))
}

async fn towards(coordinator: &str) -> std::io::Result<IpAddr> {
    let mut found = tokio::net::lookup_host(coordinator).await?;
    let to = found.next().ok_or_else(|| std::io::Error::other("the name has no address"))?;
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Connecting a datagram socket asks the routing table, and sends nothing.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(to).await?;
    Ok(socket.local_addr()?.ip())
}

pub(crate) fn worker(args: WorkerArgs) -> Result<u8, Failure> {
    let options = worker::Options { agent_socket: args.agent, worker: args.id, job: args.job };
    // A signal to everything on the node (a terminal's, a scheduler's) is the agent's to answer: it saves first, and
    // this process ends with the agent's socket.
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let mut asked = signal(kind).map_err(|error| Failure::job(format!("cannot listen for signals: {error}")))?;
        tokio::spawn(async move { while asked.recv().await.is_some() {} });
    }
    let outcome = tokio::task::block_in_place(|| worker::run(options));
    outcome.map(|()| 0).map_err(|error| Failure::job(chain(&error)))
}

/// Completes on Ctrl-C, on SIGTERM, and, for a supervised part, when standard input closes.
fn stop_asked(supervised: bool) -> Result<impl Future<Output = ()> + Send + 'static, Failure> {
    let listen = |kind| signal(kind).map_err(|error| Failure::job(format!("cannot listen for signals: {error}")));
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            () = lifeline(supervised) => {}
        }
    })
}

/// How connections are closed to others, as the command line says it.
pub(crate) fn security(args: &SecurityArgs) -> Result<Security, Failure> {
    Security::choose(args.tls.as_deref(), args.insecure_plaintext).map_err(|error| Failure::request(chain(&error)))
}

/// Reads the token, waiting a while for a coordinator that is just being started to make it.
pub(crate) async fn wait_for_token(path: &Path) -> Result<Token, Failure> {
    let deadline = Instant::now() + TOKEN_WITHIN;
    loop {
        match Token::read(path) {
            Ok(token) => return Ok(token),
            Err(_) if !path.exists() && Instant::now() < deadline => sleep(Duration::from_millis(100)).await,
            Err(error) => return Err(Failure::request(chain(&error))),
        }
    }
}

/// For an agent: the first signal asks it to leave in order, the second, or a closed standard input, at once.
fn leave_asked(
    supervised: bool,
) -> Result<(impl Future<Output = ()> + Send, impl Future<Output = ()> + Send), Failure> {
    let first = stop_asked(false)?;
    let (asked, again) = oneshot::channel();
    let drain = async move {
        first.await;
        // The other half may have been dropped: then the agent is ending already.
        let _ = asked.send(());
    };
    let stop = async move {
        let second = async {
            match again.await {
                Ok(()) => match stop_asked(false) {
                    Ok(second) => second.await,
                    Err(_) => std::future::pending().await,
                },
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            () = second => {}
            () = lifeline(supervised) => {}
        }
    };
    Ok((drain, stop))
}

/// Completes when the parent of a supervised part is gone; never for one started by hand.
async fn lifeline(supervised: bool) {
    match supervised.then(parent_gone) {
        // The thread that holds the sender ends with the parent's pipe.
        Some(gone) => drop(gone.await),
        None => std::future::pending().await,
    }
}

/// Completes when standard input closes, which the parent holds open for as long as it lives. Reading standard input
/// cannot be cancelled, so it has a thread of its own, which ends with the process.
fn parent_gone() -> oneshot::Receiver<()> {
    let (sender, gone) = oneshot::channel();
    std::thread::spawn(move || {
        let mut byte = [0; 1];
        while !matches!(std::io::stdin().read(&mut byte), Ok(0) | Err(_)) {}
        // Nobody left to tell: the process is ending anyway.
        let _ = sender.send(());
    });
    gone
}

/// What tells this boot of this machine from any other: a leader seen under the same identity and address is a former
/// process of ours.
pub(crate) fn host_identity() -> String {
    let read = |path: &str| std::fs::read_to_string(PathBuf::from(path)).map(|text| text.trim().to_string());
    let boot = read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let name = read("/proc/sys/kernel/hostname").unwrap_or_else(|_| "localhost".into());
    format!("{name}/{boot}")
}

fn default_node_name() -> Result<NodeName, Failure> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    NodeName::new(name.trim()).map_err(|error| Failure::request(format!("{error}; name this node with --node")))
}
