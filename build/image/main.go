// Command image writes an OCI image of the program to a tar file, without a container engine and without a registry:
// the static binary and certificate authorities on nothing else, run by a user that is not root.
//
// The same binary gives the same bytes wherever and whenever it runs. `podman load`, `docker load` and
// `skopeo copy oci-archive:FILE` read the file.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"debug/elf"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	user = 65532 // nonroot, as other minimal images number it
	home = "/home/nonroot"
)

// epoch is the time of every file, so that the bytes depend on the contents alone.
var epoch = time.Unix(0, 0).UTC()

type options struct{ binary, out, name, arch, version, commit string }

func main() {
	var o options
	flag.StringVar(&o.binary, "binary", "", "the program, linked statically for Linux")
	flag.StringVar(&o.out, "out", "", "the tar file to write")
	flag.StringVar(&o.name, "name", "meshery-filters", "what the image is called, without its tag")
	flag.StringVar(&o.version, "version", "dev", "the image's tag and version label")
	flag.StringVar(&o.commit, "commit", "unknown", "the revision label")
	flag.Parse()
	digest, err := write(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
	fmt.Printf("%s: %s:%s %s\n", o.out, o.name, o.version, digest)
}

// write makes the image and returns its digest.
func write(o options) (v1.Hash, error) {
	binary, err := os.ReadFile(o.binary)
	if err != nil {
		return v1.Hash{}, err
	}
	if o.arch, err = static(binary); err != nil {
		return v1.Hash{}, fmt.Errorf("%s: %w", o.binary, err)
	}
	img, err := build(binary, o)
	if err != nil {
		return v1.Hash{}, err
	}
	dir, err := os.MkdirTemp("", "meshery-filters-image-")
	if err != nil {
		return v1.Hash{}, err
	}
	defer os.RemoveAll(dir)
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{Add: img,
		Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: o.arch},
			Annotations: map[string]string{
				"org.opencontainers.image.ref.name": o.version,
				"io.containerd.image.name":          o.name + ":" + o.version,
			}}})
	if _, err := layout.Write(dir, index); err != nil {
		return v1.Hash{}, fmt.Errorf("write the layout: %w", err)
	}
	if err := pack(dir, o.out); err != nil {
		return v1.Hash{}, fmt.Errorf("write %s: %w", o.out, err)
	}
	return img.Digest()
}

// static returns the architecture of a program that runs without any file but itself.
func static(binary []byte) (arch string, err error) {
	f, err := elf.NewFile(bytes.NewReader(binary))
	if err != nil {
		return "", fmt.Errorf("not a program for Linux: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return "", errors.New("it is linked dynamically, and the image has no libraries; build it with CGO_ENABLED=0")
		}
	}
	switch f.Machine {
	case elf.EM_X86_64:
		return "amd64", nil
	case elf.EM_AARCH64:
		return "arm64", nil
	}
	return "", fmt.Errorf("it is for %s, and images are made for amd64 and arm64", f.Machine)
}

func build(binary []byte, o options) (v1.Image, error) {
	roots, err := authorities()
	if err != nil {
		return nil, err
	}
	// What changes seldom comes first, so that a new version is one new layer.
	base, err := layer(
		entry{name: "etc/passwd", mode: 0o644, data: []byte(fmt.Sprintf("nonroot:x:%d:%d:nonroot:%s:/sbin/nologin\n", user, user, home))},
		entry{name: "etc/group", mode: 0o644, data: []byte(fmt.Sprintf("nonroot:x:%d:\n", user))},
		entry{name: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, data: roots},
		entry{name: "home/nonroot/", mode: 0o700, owner: user},
		entry{name: "tmp/", mode: 0o777 | 0o1000},
	)
	if err != nil {
		return nil, err
	}
	program, err := layer(entry{name: "meshery-filters", mode: 0o755, data: binary})
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.Append(img,
		mutate.Addendum{Layer: base, MediaType: types.OCILayer, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "build/image", Comment: "certificate authorities and a user"}},
		mutate.Addendum{Layer: program, MediaType: types.OCILayer, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "build/image", Comment: "the program"}})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", o.arch, v1.Time{Time: epoch}
	config.Config = v1.Config{
		User:       fmt.Sprintf("%d:%d", user, user),
		WorkingDir: home,
		Env:        []string{"HOME=" + home, "PATH=/", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"},
		Entrypoint: []string{"/meshery-filters"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    o.name,
			"org.opencontainers.image.version":  o.version,
			"org.opencontainers.image.revision": o.commit,
			"org.opencontainers.image.licenses": "Apache-2.0",
		},
	}
	return mutate.ConfigFile(img, config)
}

// authorities are the certificates that browsers trust, in PEM, from a pinned module: the machine's own would make
// images differ. Those that are trusted under conditions only are left out, since a file cannot say them.
func authorities() ([]byte, error) {
	var out bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint != nil {
			continue
		}
		if _, err := x509.ParseCertificate(root.Certificate); err != nil {
			return nil, fmt.Errorf("read a certificate authority: %w", err)
		}
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}); err != nil {
			return nil, err
		}
	}
	if out.Len() == 0 {
		return nil, errors.New("there are no certificate authorities")
	}
	return out.Bytes(), nil
}

// entry is a file, or a folder when its name ends in a slash.
type entry struct {
	name  string
	mode  int64
	owner int
	data  []byte
}

func layer(entries ...entry) (v1.Layer, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	made := map[string]bool{}
	for _, e := range entries {
		for i, c := range e.name {
			if parent := e.name[:i+1]; c == '/' && parent != e.name && !made[parent] {
				made[parent] = true
				if err := add(w, entry{name: parent, mode: 0o755}); err != nil {
					return nil, err
				}
			}
		}
		if err := add(w, e); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(out.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
}

func add(w *tar.Writer, e entry) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: e.name, Mode: e.mode, Uid: e.owner, Gid: e.owner, Size: int64(len(e.data)), ModTime: epoch}
	if e.name[len(e.name)-1] == '/' {
		h.Typeflag = tar.TypeDir
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(e.data)
	return err
}

// pack writes the files of dir, in the order of their names, beside out and then in its place.
func pack(dir, out string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	w := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return add(w, entry{name: filepath.ToSlash(name) + "/", mode: 0o755})
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return add(w, entry{name: filepath.ToSlash(name), mode: 0o644, data: data})
	})
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), out)
}
