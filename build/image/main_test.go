package main

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// program builds a small program for Linux.
func program(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\n\nfunc main() { println(\"here\") }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", "program", "main.go")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return filepath.Join(dir, "program")
}

// unpack reads the written image back.
func unpack(t *testing.T, path string) v1.Image {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		place := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(place, 0o755)
		} else {
			var data []byte
			if data, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(place, data, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 {
		t.Fatalf("%+v, %v", manifest, err)
	}
	img, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestAnImageHoldsTheProgramAndWhatItNeedsAndNothingElse(t *testing.T) {
	binary := program(t)
	out := filepath.Join(t.TempDir(), "image.tar")
	if _, err := write(options{binary: binary, out: out, name: "meshery-filters", version: "v1", commit: "abc"}); err != nil {
		t.Fatal(err)
	}
	img := unpack(t, out)
	if err := validate.Image(img); err != nil {
		t.Error(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if c := config.Config; c.User != "65532:65532" || strings.Join(c.Entrypoint, " ") != "/meshery-filters" || c.Labels["org.opencontainers.image.revision"] != "abc" {
		t.Errorf("the configuration is %+v", c)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range layers {
		content, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		for r := tar.NewReader(content); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			names = append(names, h.Name)
			data, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			switch h.Name {
			case "meshery-filters":
				if want, err := os.ReadFile(binary); err != nil || !bytes.Equal(data, want) || h.Mode != 0o755 {
					t.Errorf("the program differs, or has mode %o: %v", h.Mode, err)
				}
			case "etc/ssl/certs/ca-certificates.crt":
				if !x509.NewCertPool().AppendCertsFromPEM(data) {
					t.Error("the authorities cannot be read")
				}
			case "home/nonroot/":
				if h.Uid != user || h.Mode != 0o700 {
					t.Errorf("the home folder is %d's, mode %o", h.Uid, h.Mode)
				}
			}
		}
		if err := content.Close(); err != nil {
			t.Fatal(err)
		}
	}
	const want = "etc/ etc/passwd etc/group etc/ssl/ etc/ssl/certs/ etc/ssl/certs/ca-certificates.crt home/ home/nonroot/ tmp/ meshery-filters"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("it holds %s", got)
	}
}

func TestTheSameProgramGivesTheSameBytes(t *testing.T) {
	binary, dir := program(t), t.TempDir()
	var images [2][]byte
	for i, name := range []string{"a.tar", "b.tar"} {
		o := options{binary: binary, out: filepath.Join(dir, name), name: "meshery-filters", version: "v1", commit: "abc"}
		if _, err := write(o); err != nil {
			t.Fatal(err)
		}
		var err error
		if images[i], err = os.ReadFile(o.out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two images of one program differ")
	}
}

func TestAProgramThatCouldNotRunIsRefused(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "image.tar")
	if _, err := write(options{binary: script, out: out}); err == nil || !strings.Contains(err.Error(), "not a program for Linux") {
		t.Errorf("a script: %v", err)
	}
	if dynamic, err := exec.LookPath("sh"); err == nil {
		if _, err := write(options{binary: dynamic, out: out}); err == nil || !strings.Contains(err.Error(), "linked dynamically") {
			t.Errorf("a program that needs libraries: %v", err)
		}
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("an image was written all the same")
	}
}
