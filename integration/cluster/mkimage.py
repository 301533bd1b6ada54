#!/usr/bin/env python3
"""Container images without a container engine: files in, OCI images out, in a folder ("store") that keeps each content once.

  mkimage.py add STORE (--image NAME [--file SOURCE:PATH[:MODE]]... [--link TARGET:PATH]... [--env K=V]...
                        [--entrypoint ARG]... [--user U])...
      writes images into the store and removes contents no image uses any more. Each file of a megabyte or more is a layer of
      its own, so that images share it.
  mkimage.py import STORE HAVE COMMAND...
      gives COMMAND (`ctr images import -`) an archive of the images whose digest is another than in the JSON file HAVE, notes
      them there and prints their names. Does not run it if there are none.
  mkimage.py digest STORE NAME...
      prints the digests of images.

Format: https://github.com/opencontainers/image-spec (image layout, manifest, configuration). Same input, same digest.
"""
import argparse, hashlib, io, json, os, subprocess, sys, tarfile

LARGE = 1 << 20
OCI = "application/vnd.oci.image."
FOLDERS = ["dev", "etc", "proc", "run", "sys", "tmp", "var"]
PASSWD = "root:x:0:0:root:/:/bin/sh\nstrata:x:1337:1337:strata:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n"
GROUP = "root:x:0:\nstrata:x:1337:\nnobody:x:65534:\n"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def entry(tar, path, data=b"", mode=0o644, kind=tarfile.REGTYPE, target=""):
    """Adds one file, folder or symbolic link, without owner and time."""
    info = tarfile.TarInfo(path.strip("/"))
    info.size, info.mode, info.type, info.linkname = len(data), mode, kind, target
    tar.addfile(info, io.BytesIO(data))


def archive(fill):
    """A tar file as bytes; `fill` adds its entries."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        fill(tar)
    return out.getvalue()


def parents(path):
    """The folders above a path, outermost first."""
    parts = path.strip("/").split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def read(path):
    with open(path, "rb") as file:
        return file.read()


class Store:
    """A folder with `blobs/` by digest, `images/` (one descriptor of a manifest each) and a cache of what large files became."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("blobs", "images"):
            os.makedirs(os.path.join(folder, name), exist_ok=True)

    def blob(self, digest):
        return os.path.join(self.folder, "blobs", digest.split(":")[1])

    def write(self, path, data):
        """Whole or not at all."""
        with open(path + ".new", "wb") as file:
            file.write(data)
        os.rename(path + ".new", path)

    def put(self, media, data):
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if not os.path.exists(self.blob(digest)):
            self.write(self.blob(digest), data)
        return {"mediaType": OCI + media, "digest": digest, "size": len(data)}

    def image(self, name):
        return os.path.join(self.folder, "images", name.replace("/", "%"))

    def images(self):
        """Name to descriptor of the manifest."""
        out = {}
        for file in sorted(os.listdir(os.path.join(self.folder, "images"))):
            if not file.endswith(".new"):
                out[file.replace("%", "/")] = json.loads(read(os.path.join(self.folder, "images", file)))
        return out

    def sweep(self):
        """Removes what no image uses."""
        used = set()
        for descriptor in self.images().values():
            used.update(self.closure(descriptor))
        for file in os.listdir(os.path.join(self.folder, "blobs")):
            if "sha256:" + file not in used:
                os.remove(os.path.join(self.folder, "blobs", file))

    def closure(self, descriptor):
        manifest = json.loads(read(self.blob(descriptor["digest"])))
        return [b["digest"] for b in [*manifest["layers"], manifest["config"], descriptor]]


def large_layer(store, source, path, mode):
    """The layer that holds one large file. What the file became is remembered by its size and time, to spare the hashing."""
    stat = os.stat(source)
    key = json.dumps([source, path, mode, stat.st_size, stat.st_mtime_ns])
    note = os.path.join(store.folder, "layer." + hashlib.sha256((source + ":" + path).encode()).hexdigest()[:16])
    if os.path.exists(note):
        known = json.loads(read(note))
        if known["key"] == key and os.path.exists(store.blob(known["layer"]["digest"])):
            return known["layer"]
    layer = store.put("layer.v1.tar", archive(lambda tar: entry(tar, path, read(source), mode)))
    store.write(note, json.dumps({"key": key, "layer": layer}).encode())
    return layer


def add(store, args):
    files = []
    for text in args.file:
        source, path, *mode = text.split(":")
        files.append((source, path, int(mode[0], 8) if mode else 0o755))
    links = [text.split(":") for text in args.link]
    large = [f for f in files if os.path.getsize(f[0]) >= LARGE]

    def base(tar):
        folders = set(FOLDERS)
        for path in [f[1] for f in files] + [l[1] for l in links]:
            folders.update(parents(path))
        for folder in sorted(folders):
            entry(tar, folder, mode=0o1777 if folder == "tmp" else 0o755, kind=tarfile.DIRTYPE)
        # As on every distribution; pods mount secrets below /var/run.
        entry(tar, "var/run", kind=tarfile.SYMTYPE, mode=0o777, target="../run")
        entry(tar, "etc/passwd", PASSWD.encode())
        entry(tar, "etc/group", GROUP.encode())
        for source, path, mode in files:
            if (source, path, mode) not in large:
                entry(tar, path, read(source), mode)
        for target, path in links:
            entry(tar, path, kind=tarfile.SYMTYPE, mode=0o777, target=target)

    layers = [store.put("layer.v1.tar", archive(base))] + [large_layer(store, *f) for f in large]
    config = {
        "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
        "config": {"Entrypoint": args.entrypoint, "Cmd": args.cmd, "Env": [PATH, *args.env], "WorkingDir": "/", "User": args.user},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2, "mediaType": OCI + "manifest.v1+json",
        "config": store.put("config.v1+json", json.dumps(config).encode()), "layers": layers,
    }
    descriptor = store.put("manifest.v1+json", json.dumps(manifest).encode())
    store.write(store.image(args.name), json.dumps(descriptor).encode())


def pack(store, images, out):
    """An image layout of these images, as a tar stream."""
    platform = {"architecture": "amd64", "os": "linux"}
    index = {"schemaVersion": 2, "manifests": [
        {**images[name], "platform": platform, "annotations": {"io.containerd.image.name": name}} for name in images]}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        entry(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        entry(tar, "index.json", json.dumps(index).encode())
        for digest in dict.fromkeys(d for name in images for d in store.closure(images[name])):
            entry(tar, "blobs/sha256/" + digest.split(":")[1], read(store.blob(digest)))


def import_new(store, have, command):
    known = json.loads(read(have)) if os.path.exists(have) else {}
    images = {name: descriptor for name, descriptor in store.images().items() if known.get(name) != descriptor["digest"]}
    if not images:
        return
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        # The other end's own words are worth more than "broken pipe".
        try:
            pack(store, images, process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass
        words = process.stdout.read().decode(errors="replace")
    if process.returncode != 0:
        sys.exit(f"mkimage: import: {' '.join(command)} ended with {process.returncode}: {words}")
    store.write(have, json.dumps(known | {name: images[name]["digest"] for name in images}, indent=1).encode())
    print(" ".join(images))


def options(words):
    """What follows one --image."""
    parser = argparse.ArgumentParser(prog="mkimage.py add STORE --image", allow_abbrev=False)
    parser.add_argument("name")
    for option in ("file", "link", "env", "entrypoint", "cmd"):
        parser.add_argument("--" + option, action="append", default=[])
    parser.add_argument("--user", default="")
    return parser.parse_args(words)


def main(command="", folder="", *words):
    if not folder or command not in ("add", "import", "digest"):
        sys.exit(__doc__)
    store = Store(folder)
    if command == "import":
        import_new(store, words[0], words[1:])
    elif command == "digest":
        for name in words:
            print(store.images()[name]["digest"])
    else:
        starts = [i for i, word in enumerate(words) if word == "--image"] + [len(words)]
        for start, end in zip(starts, starts[1:]):
            args = options(words[start + 1 : end])
            try:
                add(store, args)
            except OSError as error:
                sys.exit(f"mkimage: {args.name}: {error}")
        store.sweep()


if __name__ == "__main__":
    main(*sys.argv[1:])
