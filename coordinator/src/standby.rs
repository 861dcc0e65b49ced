//! What a coordinator says while another one leads: that it stands by.
//!
//! Its address is bound from the start, so that a mistake shows at once. Were nothing said there, an agent or an
//! operator that tries one coordinator after another would wait at this one for its deadline, and find the leader that
//! much later.

use proto::net::Listener;
use proto::tls::Security;
use tokio::net::TcpListener;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::error::CoordinatorError;

/// The answer to every call.
const STANDS_BY: &str = "this coordinator stands by: another one leads, or is being looked for";

/// A second handle of a listening socket; a network other than the operating system's has none to give.
pub(crate) fn share(listener: Listener) -> std::io::Result<(Listener, Option<Listener>)> {
    let Listener::System(listener) = listener else { return Ok((listener, None)) };
    let listener = listener.into_std()?;
    let second = TcpListener::from_std(listener.try_clone()?)?;
    Ok((TcpListener::from_std(listener)?.into(), Some(second.into())))
}

/// Turns every caller away, in words. When this is dropped the connections it has taken in are told to go.
pub(crate) async fn turn_away(listener: Option<Listener>, security: Security) -> Result<(), CoordinatorError> {
    // Whoever calls waits until this one leads.
    let Some(listener) = listener else { return std::future::pending().await };
    let answer = || async { Status::unavailable(STANDS_BY).into_http::<axum::body::Body>() };
    let routes = Routes::from(axum::Router::new().fallback(answer));
    Server::builder()
        .add_routes(routes)
        .serve_with_incoming_shutdown(proto::tls::incoming(listener, &security), std::future::pending())
        .await
        .map_err(|error| CoordinatorError::broken("the server of a coordinator that stands by", error))
}
