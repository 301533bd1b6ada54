//! `google.protobuf.Any` in and out.
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

/// Why an `Any` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum AnyError {
    #[error("type is {found}, expected {expected}")]
    WrongType { expected: String, found: String },
    #[error("{type_url}: {source}")]
    Decode { type_url: String, source: prost::DecodeError },
}

/// Wraps a message under a type URL (`type.googleapis.com/...`).
pub fn pack<M: Message>(type_url: &str, message: &M) -> Any {
    Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }
}

/// Decodes the payload as `M`, whatever the type URL says; the caller has matched on it.
///
/// # Errors
/// If the payload is not an `M`.
pub fn unpack<M: Message + Default>(any: &Any) -> Result<M, AnyError> {
    M::decode(any.value.as_slice()).map_err(|source| AnyError::Decode { type_url: any.type_url.clone(), source })
}

/// Decodes the payload as `M` if the type URL is `type_url`.
///
/// # Errors
/// If the type differs or the payload is not an `M`.
pub fn unpack_as<M: Message + Default>(type_url: &str, any: &Any) -> Result<M, AnyError> {
    if any.type_url != type_url {
        return Err(AnyError::WrongType { expected: type_url.to_owned(), found: any.type_url.clone() });
    }
    unpack(any)
}
