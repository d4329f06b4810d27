package cli

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/problem"
)

// stdin is the file name that stands for standard input.
const stdin = "-"

func filesFlag(cmd *cobra.Command, files *[]string) {
	cmd.Flags().StringArrayVarP(files, "filename", "f", nil, "`file` with Filter documents, - for standard input; repeat it for several")
	_ = cmd.MarkFlagFilename("filename", "yaml", "yml", "json")
}

// readDocuments reads the files' documents, checks them, and puts the bytes of module.file in the place of its path. A
// mistake is told with the file's name and line; all of all files at once. keysOnly asks for no more than names.
func (a *app) readDocuments(files []string, keysOnly bool) ([]filter.Document, error) {
	var docs []filter.Document
	var mistakes []problem.Field
	in := map[filter.Key]string{} // the file that has it
	for _, name := range files {
		body, err := a.readBody("--filename", name)
		if err != nil {
			return nil, err
		}
		if u, found, err := filter.ReadUndo(body, a.namespace); found && err == nil {
			to := ""
			if u.Spec.Revision > 0 {
				to = fmt.Sprintf(" --to %d", u.Spec.Revision)
			}
			return nil, usage("%s is an Undo: `meshery-filters undo %s%s` does what it says", name, u.Key(a.namespace), to)
		}
		read, err := check(body, a.namespace, keysOnly)
		var p *problem.Problem
		if errors.As(err, &p) {
			for _, m := range p.Fields {
				mistakes = append(mistakes, inFile(name, m))
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		for i, d := range read {
			key := d.Filter(a.namespace).Key
			if first, twice := in[key]; twice && !keysOnly {
				mistakes = append(mistakes, inFile(name, problem.Field{Path: "metadata.name", Cause: fmt.Sprintf("%s is also in %s", key, first), Remedy: "give each filter its own name"}))
			}
			in[key] = name
			if d.Spec.Module.File != "" && !keysOnly {
				if d.Spec.Module, err = loadModule(name, d.Spec.Module); err != nil {
					at := "spec.module.file"
					if len(read) > 1 {
						at = fmt.Sprintf("documents[%d].%s", i, at)
					}
					mistakes = append(mistakes, inFile(name, problem.Field{Path: at, Cause: err.Error()}))
				}
			}
			docs = append(docs, d)
		}
	}
	if err := problem.InvalidDocument.WithFields("", mistakes); err != nil {
		return nil, err
	}
	return docs, nil
}

// check is the adapter's own reading of a body.
func check(body []byte, namespace string, keysOnly bool) ([]filter.Document, error) {
	var err error
	if keysOnly {
		_, err = filter.ReadKeys(body, namespace)
	} else {
		_, err = filter.Read(body, namespace)
	}
	if err != nil {
		return nil, err
	}
	return filter.Decode(body)
}

func inFile(name string, m problem.Field) problem.Field {
	if name == stdin {
		name = "standard input"
	}
	if m.Path == "" {
		m.Path = name
	} else {
		m.Path = name + ": " + m.Path
	}
	return m
}

// readBody reads a file with documents, or standard input, that a flag names.
func (a *app) readBody(flag, name string) ([]byte, error) {
	if name != stdin {
		body, err := readFile(name, filter.MaxBody)
		if err != nil {
			return nil, usage("%s: %w", flag, err)
		}
		return body, nil
	}
	body, err := io.ReadAll(io.LimitReader(a.In, filter.MaxBody+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read standard input: %w", err)
	case len(body) > filter.MaxBody:
		return nil, usage("standard input has more than the %d bytes allowed", filter.MaxBody)
	}
	return body, nil
}

// loadModule reads the file that a document names, from the document's own folder. The digest is checked by the
// adapter.
func loadModule(document string, m filter.Module) (filter.Module, error) {
	path := m.File
	if !filepath.IsAbs(path) && document != stdin {
		path = filepath.Join(filepath.Dir(document), path)
	}
	data, err := readFile(path, filter.MaxModule)
	if err != nil {
		return m, err
	}
	if len(data) == 0 {
		return m, fmt.Errorf("%s is empty", path)
	}
	m.File, m.Inline = "", base64.StdEncoding.EncodeToString(data)
	return m, nil
}

// readFile reads a whole file of at most limit bytes. Its errors name the file.
func readFile(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, fmt.Errorf("%s is a folder", name)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1)) // a pipe has no size before it is read
	switch {
	case err != nil:
		return nil, err
	case int64(len(data)) > limit:
		return nil, fmt.Errorf("%s has more than the %d bytes allowed", name, limit)
	}
	return data, nil
}

// bodyOf is the documents as the adapter takes them.
func bodyOf(docs []filter.Document) (string, error) {
	tooLarge := usage("the documents and their modules have more than the %d bytes that one operation takes; apply them one by one", filter.MaxBody)
	modules := 0
	for _, d := range docs {
		modules += len(d.Spec.Module.Inline)
	}
	if modules > filter.MaxBody { // known before a copy of all is made
		return "", tooLarge
	}
	data, err := marshal(docs)
	if err != nil {
		return "", err
	}
	if len(data) > filter.MaxBody {
		return "", tooLarge
	}
	return string(data), nil
}
