//! The command line of `cairn certs …`, as data.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use proto::ids::{ClusterName, NodeName};
use proto::tls::{Host, Role};

use crate::args::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum CertsCommand {
    /// Make a cluster's own certificate authority: ca.pem, and ca-key.pem, which stays with you.
    Init(InitArgs),
    /// Issue one part's certificate: a folder with ca.pem, cert.pem and key.pem for its --tls.
    Issue(IssueArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  cairn certs init certs --cluster lab

Whoever has ca-key.pem can issue certificates for every part of the cluster. Keep it off the nodes.")]
pub(crate) struct InitArgs {
    /// The folder to make it in.
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// The cluster's name, which all its certificates carry.
    #[arg(long, value_name = "NAME", default_value = "cairn")]
    pub(crate) cluster: ClusterName,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cairn certs issue certs --role coordinator --name main --host 10.0.0.1 --host cairn.example.org
  cairn certs issue certs --name a --host 10.0.0.2                       node a's agent, --ring-host 10.0.0.2
  cairn certs issue certs --role operator --name me --days 30

A coordinator may do everything; an agent attaches only the node it is named after, and shares snapshots; an operator
commands jobs. There is no revocation: a lost key is good until its certificate expires, so keep --days short, or start
over with `certs init` in another folder.")]
pub(crate) struct IssueArgs {
    /// The folder that `cairn certs init` made.
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// Whom it is for; an agent's is its node's name (its --node).
    #[arg(long, value_name = "NODE")]
    pub(crate) name: NodeName,
    /// Address or name that others connect to it by; may be repeated. The name and loopback are always in.
    #[arg(long, value_name = "ADDR_OR_NAME")]
    pub(crate) host: Vec<Host>,
    /// What it may do.
    #[arg(long, value_enum, default_value = "agent")]
    pub(crate) role: RoleArg,
    /// Days until it expires.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(i32).range(1..=3650))]
    pub(crate) days: i32,
    /// Where to write; by default DIR/ROLE-NAME.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

/// [`Role`], as the command line has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// The control plane.
    Coordinator,
    /// One node.
    Agent,
    /// A person or a script.
    Operator,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Coordinator => Self::Coordinator,
            RoleArg::Agent => Self::Agent,
            RoleArg::Operator => Self::Operator,
        }
    }
}
