//! `cairn certs …`: a cluster's own certificate authority, and the certificates of its parts.

mod args;

use std::str::FromStr;

use proto::tls::{Authority, Credentials, Host, Identity, Role, TlsError};
use serde_json::json;

pub(crate) use args::CertsCommand;
use args::{InitArgs, IssueArgs};

use crate::args::Output;
use crate::failure::{Failure, chain};
use crate::table::say;

pub(crate) fn run(command: CertsCommand) -> Result<u8, Failure> {
    let outcome = match command {
        CertsCommand::Init(args) => init(&args),
        CertsCommand::Issue(args) => issue(&args),
    };
    outcome.map(|()| 0).map_err(|error| Failure::request(chain(&error)))
}

fn init(args: &InitArgs) -> Result<(), TlsError> {
    Authority::create(&args.folder, &args.cluster)?;
    let (certificate, key) = (args.folder.join("ca.pem"), args.folder.join("ca-key.pem"));
    let (cluster, folder) = (&args.cluster, args.folder.display());
    if args.output == Output::Json {
        say!("{}", json!({"event": "authority", "cluster": cluster, "certificate": certificate, "key": key}));
        return Ok(());
    }
    say!("cluster {cluster}: certificate authority in {folder}");
    say!("  {}      for every part; `certs issue` copies it", certificate.display());
    say!("  {}  for you alone: whoever has it can join the cluster", key.display());
    say!();
    say!("next, one certificate for each part:");
    say!("  cairn certs issue {folder} --role coordinator --name main --host ADDRESS");
    say!("  cairn certs issue {folder} --role agent --name NODE --host ADDRESS");
    say!("  cairn certs issue {folder} --role operator --name YOU");
    Ok(())
}

fn issue(args: &IssueArgs) -> Result<(), TlsError> {
    let authority = Authority::read(&args.folder)?;
    let role = Role::from(args.role);
    let identity = Identity { cluster: authority.cluster().clone(), role, name: args.name.clone() };
    let hosts = hosts(args);
    let out = args.out.clone().unwrap_or_else(|| args.folder.join(format!("{role}-{}", args.name)));
    let last = authority.issue(&out, &identity, &hosts, args.days)?;
    // Read back as the part will read it.
    Credentials::load(&out)?;
    let names: Vec<String> = hosts.iter().map(ToString::to_string).collect();
    let folder = out.display();
    if args.output == Output::Json {
        let certificate = json!({
            "event": "certificate", "identity": identity.to_string(), "role": role.as_str(), "name": args.name,
            "hosts": names, "expires": last.to_string(), "folder": out,
        });
        say!("{certificate}");
        return Ok(());
    }
    say!("{identity}, for {}, until {last}", names.join(", "));
    say!("  {folder}/ca.pem, cert.pem, key.pem");
    say!();
    say!("next, with that folder on its machine (key.pem with mode 0600):");
    match role {
        Role::Coordinator => say!("  cairn coordinator --store URL --listen ADDRESS:7070 --tls {folder}"),
        Role::Agent => {
            let name = &args.name;
            say!("  cairn agent --coordinator ADDRESS:7070 --node {name} --ring-host ADDRESS --tls {folder}");
        }
        Role::Operator => say!("  cairn jobs --coordinator ADDRESS:7070 --tls {folder}"),
    }
    Ok(())
}

/// What others may connect to: what was asked for, the part's own name if the DNS could have it, and its own machine.
fn hosts(args: &IssueArgs) -> Vec<Host> {
    let own = [args.name.as_str(), "localhost", "127.0.0.1", "::1"];
    let own = own.into_iter().filter_map(|text| Host::from_str(text).ok());
    let mut hosts: Vec<Host> = Vec::new();
    for host in args.host.iter().cloned().chain(own) {
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}
