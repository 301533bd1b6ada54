//! A token issuer as an OIDC provider looks to a mesh: a key set to fetch, and tokens signed with it.
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

use crate::http1;

/// Serve the key set at /jwks.json (and every other path).
#[derive(Debug, clap::Args)]
pub(crate) struct Jwks {
    /// Folder of the private keys; made, with fresh keys, if it has none
    #[arg(long)]
    keys: PathBuf,
    #[arg(long, default_value = "127.0.0.1:9090")]
    listen: SocketAddr,
    /// Print the key set instead of serving it
    #[arg(long)]
    print: bool,
}

/// Mint a token.
#[derive(Debug, clap::Args)]
pub(crate) struct Token {
    /// Folder of the private keys, as `jwks --keys`
    #[arg(long)]
    keys: PathBuf,
    #[arg(long, default_value = "RS256", value_parser = ["RS256", "ES256"])]
    algorithm: String,
    #[arg(long, default_value = "https://issuer.example")]
    issuer: String,
    #[arg(long, default_value = "alice")]
    subject: String,
    #[arg(long)]
    audience: Option<String>,
    /// Seconds from now until it expires; negative: it expired that long ago
    #[arg(long, default_value_t = 3600, allow_negative_numbers = true)]
    expires_in: i64,
    /// NAME=VALUE, may be repeated; a VALUE that is JSON is taken as JSON
    #[arg(long = "claim")]
    claims: Vec<String>,
}

/// Id (and file name) of each key, and its algorithm.
const KEYS: [(&str, Algorithm); 2] = [("rs256", Algorithm::RS256), ("es256", Algorithm::ES256)];

impl Jwks {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let document = key_set(&self.keys)?;
        if self.print {
            println!("{document}");
            return Ok(());
        }
        let listener = TcpListener::bind(self.listen).await.with_context(|| format!("listening on {}", self.listen))?;
        let body = Bytes::from(document.to_string());
        let answer = move |_| {
            let response = Response::builder().header("content-type", "application/json");
            std::future::ready(Ok(response.body(Full::new(body.clone())).unwrap_or_default()))
        };
        http1::serve(listener, answer).await;
        Ok(())
    }
}

impl Token {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        println!("{}", self.mint()?);
        Ok(())
    }

    fn mint(&self) -> anyhow::Result<String> {
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs())?;
        let mut claims = Map::new();
        claims.insert("iss".into(), json!(self.issuer));
        claims.insert("sub".into(), json!(self.subject));
        claims.insert("iat".into(), json!(now.min(now + self.expires_in) - 60));
        claims.insert("exp".into(), json!(now + self.expires_in));
        if let Some(audience) = &self.audience {
            claims.insert("aud".into(), json!(audience));
        }
        for claim in &self.claims {
            let Some((name, value)) = claim.split_once('=') else { bail!("--claim {claim}: not NAME=VALUE") };
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
            claims.insert(name.to_owned(), value);
        }
        let (name, algorithm) = KEYS[usize::from(self.algorithm == "ES256")];
        let mut header = Header::new(algorithm);
        header.kid = Some(name.to_owned());
        Ok(jsonwebtoken::encode(&header, &claims, &private_key(&self.keys, name, algorithm)?)?)
    }
}

/// The public halves (RFC 7517).
fn key_set(folder: &Path) -> anyhow::Result<Value> {
    let mut keys = Vec::new();
    for (name, algorithm) in KEYS {
        let key = private_key(folder, name, algorithm)?;
        let mut jwk = Jwk::from_encoding_key(&key, algorithm).with_context(|| format!("public half of {name}"))?;
        jwk.common.key_id = Some(name.to_owned());
        keys.push(serde_json::to_value(jwk)?);
    }
    Ok(json!({"keys": keys}))
}

/// Reads a key, or makes it on first use.
fn private_key(folder: &Path, name: &str, algorithm: Algorithm) -> anyhow::Result<EncodingKey> {
    let path = folder.join(format!("{name}.pem"));
    let pem = match fs::read_to_string(&path) {
        Ok(pem) => pem,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => make_key(folder, &path, algorithm)?,
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let key = match algorithm {
        Algorithm::ES256 => EncodingKey::from_ec_pem(pem.as_bytes()),
        _ => EncodingKey::from_rsa_pem(pem.as_bytes()),
    };
    key.with_context(|| path.display().to_string())
}

fn make_key(folder: &Path, path: &Path, algorithm: Algorithm) -> anyhow::Result<String> {
    let kind = if algorithm == Algorithm::ES256 { &PKCS_ECDSA_P256_SHA256 } else { &PKCS_RSA_SHA256 };
    let pem = KeyPair::generate_for(kind).context("making a key")?.serialize_pem();
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
    std::io::Write::write_all(&mut file, pem.as_bytes())?;
    // Linking fails if another process was first: then its key is the one.
    let linked = fs::hard_link(&partial, path);
    fs::remove_file(&partial)?;
    match linked {
        Ok(()) => Ok(pem),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(fs::read_to_string(path)?),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation};

    use super::*;

    #[test]
    fn tokens_verify_with_the_published_keys() {
        let folder = std::env::temp_dir().join(format!("strata-echo-issuer-{}", std::process::id()));
        for algorithm in ["RS256", "ES256"] {
            let token = Token {
                keys: folder.clone(),
                algorithm: algorithm.into(),
                issuer: "https://i".into(),
                subject: "bob".into(),
                audience: None,
                expires_in: 60,
                claims: vec!["group=testers".into(), "level=3".into()],
            };
            let text = token.mint().unwrap();
            let set: jsonwebtoken::jwk::JwkSet = serde_json::from_value(key_set(&folder).unwrap()).unwrap();
            let header = jsonwebtoken::decode_header(&text).unwrap();
            let key = DecodingKey::from_jwk(set.find(header.kid.as_deref().unwrap()).unwrap()).unwrap();
            let claims = jsonwebtoken::decode::<Value>(&text, &key, &Validation::new(header.alg)).unwrap().claims;
            assert_eq!(
                (&claims["sub"], &claims["group"], &claims["level"]),
                (&json!("bob"), &json!("testers"), &json!(3))
            );
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
