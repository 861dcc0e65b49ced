//! The coordinator's leadership of a store: the library's, with the coordinator's errors and advice.

use checkpoint_store::{Claim, LeadError, Leadership, Store};

use crate::error::CoordinatorError;

/// Waits for the leadership, or is refused while another leader is alive.
pub(crate) async fn acquire(
    store: &Store,
    address: &str,
    host: &str,
    standby: bool,
) -> Result<Leadership, CoordinatorError> {
    let claim = Claim { address: Some(address.to_string()), host: host.to_string() };
    Ok(Leadership::acquire(store, &claim, standby).await?)
}

/// Beats until the leadership is lost, and says how; gives it back when `stop` completes.
pub(crate) async fn hold(leadership: Leadership, stop: impl Future<Output = ()>) -> Result<(), CoordinatorError> {
    Ok(leadership.hold(stop).await?)
}

impl From<LeadError> for CoordinatorError {
    fn from(error: LeadError) -> Self {
        match error {
            LeadError::Led { store, address, host, epoch } => Self::Led {
                store,
                address: address.unwrap_or_else(|| "(a command at work)".into()),
                host,
                epoch: epoch.get(),
            },
            LeadError::Fenced(why) => Self::Fenced(why),
            LeadError::Store(error) => Self::Store(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_coordinator_is_told_who_leads() {
        let store = Store::memory();
        let first = acquire(&store, "127.0.0.1:1", "host/boot", false).await.unwrap();
        let holding = tokio::spawn(hold(first, std::future::pending()));
        let refused = acquire(&store, "127.0.0.1:2", "host/boot", false).await.unwrap_err();
        assert!(matches!(&refused, CoordinatorError::Led { address, .. } if address == "127.0.0.1:1"), "{refused}");
        assert_eq!(refused.exit_code(), 2);
        holding.abort();
    }
}
