//! Winning and holding the leadership of a store.
//!
//! A new coordinator takes the next epoch if there is no leader, if the last one stepped down, or if it is surely dead:
//! its beats stand still, or it ran on this host at the address this process now holds. A leader beats every second.
//! That gives liveness only; what keeps a deposed leader from harm is that it loses every append.

use std::time::Duration;

use checkpoint_store::Store;
use checkpoint_store::error::{Kind, StoreError};
use checkpoint_store::leader::{self, LEADER_FORMAT, LeaderRecord, LeaderView, Take};
use proto::ids::Epoch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::error::CoordinatorError;

/// Between two beats.
const BEAT: Duration = Duration::from_secs(1);
/// A leader whose beats stand still this long is dead.
const STILL: Duration = Duration::from_secs(5);
/// Between two looks at another leader's beats.
const LOOK: Duration = Duration::from_millis(500);
/// Beats between two checks that no higher epoch exists.
const CHECK_EVERY: u64 = 5;
/// A leader that cannot beat this long steps down: another one has long taken its place.
const MOST_SILENCE: Duration = Duration::from_mins(1);

/// A won epoch.
#[derive(Debug, Clone)]
pub(crate) struct Leadership {
    store: Store,
    pub(crate) epoch: Epoch,
    /// The token in the leader record, which agents must find in their store.
    pub(crate) token: String,
}

/// Waits for the leadership, or is refused while another coordinator is alive.
pub(crate) async fn acquire(
    store: &Store,
    address: &str,
    host: &str,
    standby: bool,
) -> Result<Leadership, CoordinatorError> {
    loop {
        let view = leader::observe(store).await?;
        let next = match &view {
            None => Epoch::ZERO.next(),
            Some(view) => {
                if !is_free(view, address, host) && !stands_still(store, view).await? {
                    if standby {
                        continue;
                    }
                    return Err(CoordinatorError::Led {
                        store: store.url().to_string(),
                        address: view.leader.address.clone().unwrap_or_else(|| "(a command at work)".into()),
                        host: view.leader.host.clone(),
                        epoch: view.epoch.get(),
                    });
                }
                view.epoch.next()
            }
        };
        let Some(epoch) = next else {
            return Err(StoreError::Corrupt("the leader epochs are used up".into()).into());
        };
        let token = store.token();
        let record = LeaderRecord {
            format: LEADER_FORMAT,
            epoch,
            address: Some(address.to_string()),
            host: host.to_string(),
            token: token.clone(),
        };
        match leader::take(store, epoch, &record).await? {
            Take::Won => return Ok(Leadership { store: store.clone(), epoch, token }),
            Take::Lost => sleep(LOOK).await,
        }
    }
}

/// Whether the last leader is surely gone.
fn is_free(view: &LeaderView, address: &str, host: &str) -> bool {
    // Two processes cannot listen at one address of one boot of one host, and this one does.
    view.released || (view.leader.address.as_deref() == Some(address) && view.leader.host == host)
}

/// Watches another leader's beats; `false` as soon as one moves.
async fn stands_still(store: &Store, before: &LeaderView) -> Result<bool, StoreError> {
    tracing::info!(epoch = before.epoch.get(), leader = ?before.leader.address, "watching whether the leader is alive");
    let begin = Instant::now();
    while begin.elapsed() < STILL {
        sleep(LOOK).await;
        match leader::observe(store).await? {
            Some(now) if now.released => return Ok(true),
            Some(now) if (now.epoch, now.newest_beat) != (before.epoch, before.newest_beat) => return Ok(false),
            _ => {}
        }
    }
    Ok(true)
}

impl Leadership {
    /// Beats until the leadership is lost, and says how; releases it when `stop` completes.
    pub(crate) async fn hold(self, stop: impl Future<Output = ()>) -> Result<(), CoordinatorError> {
        let mut ticks = interval(BEAT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut number, mut beaten) = (0_u64, Instant::now());
        tokio::pin!(stop);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = &mut stop => {
                    leader::release(&self.store, self.epoch, number + 1).await?;
                    return Ok(());
                }
            }
            number += 1;
            match self.beat(number).await {
                Ok(()) => beaten = Instant::now(),
                Err(error) if error.kind() == Kind::Fenced => return Err(CoordinatorError::Fenced(error.to_string())),
                Err(error) if beaten.elapsed() > MOST_SILENCE => {
                    let seconds = MOST_SILENCE.as_secs();
                    return Err(CoordinatorError::Fenced(format!("no beat was stored for {seconds} s: {error}")));
                }
                Err(error) => tracing::warn!("a beat was not stored: {error}"),
            }
        }
    }

    async fn beat(&self, number: u64) -> Result<(), StoreError> {
        if number.is_multiple_of(CHECK_EVERY)
            && let Some(next) = self.epoch.next()
            && let Some(other) = leader::read(&self.store, next).await?
        {
            let (address, host) = (other.address.unwrap_or_default(), other.host);
            return Err(StoreError::Fenced(format!("epoch {next} was taken by {address} on host {host}")));
        }
        leader::beat(&self.store, self.epoch, number).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_living_leader_is_respected_and_a_dead_one_replaced() {
        let store = Store::memory();
        let first = acquire(&store, "127.0.0.1:1", "host/boot", false).await.unwrap();
        assert_eq!(first.epoch.get(), 1);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let holding = tokio::spawn(first.hold(async {
            let _ = stopped.await;
        }));
        let refused = acquire(&store, "127.0.0.1:2", "host/boot", false).await.unwrap_err();
        assert!(matches!(&refused, CoordinatorError::Led { address, .. } if address == "127.0.0.1:1"), "{refused}");
        assert_eq!(refused.exit_code(), 2);
        // The same address of the same boot is held by the caller, so the former holder is dead.
        let second = acquire(&store, "127.0.0.1:1", "host/boot", false).await.unwrap();
        assert_eq!(second.epoch.get(), 2);
        stop.send(()).unwrap();
        holding.await.unwrap().unwrap();
        second.hold(async {}).await.unwrap();
        let third = acquire(&store, "127.0.0.1:3", "other", false).await.unwrap();
        assert_eq!(third.epoch.get(), 3);
    }
}
