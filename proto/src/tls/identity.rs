//! Who a certificate is for.

use std::fmt;
use std::str::FromStr;

use tokio_rustls::rustls::pki_types::CertificateDer;

use crate::ids::{ClusterName, NodeName};

/// The scheme of the name in a certificate.
const SCHEME: &str = "cairn://";

/// What the holder of a certificate may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Leads the cluster: may do all that the others may.
    Coordinator,
    /// Attaches one node, under its own name, and shares snapshots with other agents.
    Agent,
    /// Commands jobs.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Coordinator, Self::Agent, Self::Operator];

    /// As it is written in a certificate.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Agent => "agent",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name in a certificate, `cairn://<cluster>/<role>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The cluster it belongs to.
    pub cluster: ClusterName,
    /// What it may do there.
    pub role: Role,
    /// Which of those it is; an agent's is its node's name.
    pub name: NodeName,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.cluster, self.role, self.name)
    }
}

impl FromStr for Identity {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.strip_prefix(SCHEME).ok_or(())?.split('/');
        let (Some(cluster), Some(role), Some(name), None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(());
        };
        Ok(Self {
            cluster: ClusterName::new(cluster).map_err(drop)?,
            role: Role::ALL.into_iter().find(|known| known.as_str() == role).ok_or(())?,
            name: NodeName::new(name).map_err(drop)?,
        })
    }
}

impl Identity {
    /// Whom a certificate names; `None` unless it names exactly one.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
        let mut named = parsed.valid_uri_names().filter(|name| name.starts_with(SCHEME));
        let only = named.next()?;
        if named.next().is_some() { None } else { only.parse().ok() }
    }

    /// The cluster that a CA's certificate names, `cairn://<cluster>`.
    pub fn cluster_of_ca(certificate: &CertificateDer<'_>) -> Option<ClusterName> {
        let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
        let named = parsed.valid_uri_names().find_map(|name| name.strip_prefix(SCHEME))?;
        ClusterName::new(named).ok()
    }

    /// The name of a CA's certificate.
    pub fn ca_name(cluster: &ClusterName) -> String {
        format!("{SCHEME}{cluster}")
    }

    /// Whether it may attach an agent under a node's name.
    pub fn may_attach(&self, node: &NodeName) -> bool {
        match self.role {
            Role::Coordinator => true,
            Role::Agent => self.name == *node,
            Role::Operator => false,
        }
    }
}
