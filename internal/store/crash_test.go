package store

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"
)

// Another process writes the same record over and over and says each number once Put has returned. It is killed in the
// middle of that.
func TestAKilledWriterLosesNothingItHadStored(t *testing.T) {
	const variable = "STORE_TEST_WRITER"
	if path := os.Getenv(variable); path != "" {
		d, err := Open(context.Background(), Options{StateDir: path})
		if err != nil {
			t.Fatal(err)
		}
		for i := 1; ; i++ {
			if err := d.Records().Put(context.Background(), "k", record(i)); err != nil {
				t.Fatal(err)
			}
			fmt.Println(i)
		}
	}
	path := t.TempDir()
	for kill := range 8 {
		writer := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=30s")
		writer.Env = append(os.Environ(), variable+"="+path)
		out, err := writer.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := writer.Start(); err != nil {
			t.Fatal(err)
		}
		stored := 0
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if stored, err = strconv.Atoi(lines.Text()); err != nil {
				t.Fatalf("the writer said %q", lines.Text())
			}
			if stored == 20+3*kill {
				// A little later, so that a write is under way.
				time.AfterFunc(time.Duration(kill*100)*time.Microsecond, func() { _ = writer.Process.Kill() })
			}
		}
		_ = writer.Wait()
		if stored < 20 {
			t.Fatalf("the writer ended after %d", stored)
		}
		d := openStore(t, path)
		value, err := d.Records().Get(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		// The next may have been stored without having been said.
		if !bytes.Equal(value, record(stored)) && !bytes.Equal(value, record(stored+1)) {
			t.Errorf("%d was stored, and %.20q is there", stored, value)
		}
		d.Close()
	}
}

func record(i int) []byte { return bytes.Repeat([]byte(fmt.Sprintf("%d ", i)), 5000) }
