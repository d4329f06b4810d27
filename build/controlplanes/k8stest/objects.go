package k8stest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/meshery/meshery-filters/templates"
)

// Apply makes objects hold, by server-side apply as Admin.
func (s *Server) Apply(ctx context.Context, objects ...map[string]any) error {
	for _, o := range objects {
		if err := s.Send(ctx, http.MethodPatch, Path(o)+"?fieldManager=k8stest&force=true", o); err != nil {
			return err
		}
	}
	return nil
}

// Delete takes objects away as Admin.
func (s *Server) Delete(ctx context.Context, objects ...map[string]any) error {
	for _, o := range objects {
		if err := s.Send(ctx, http.MethodDelete, Path(o), nil); err != nil {
			return err
		}
	}
	return nil
}

// Install makes the kinds of CustomResourceDefinitions, in YAML, but for those without, and waits until they are served.
func (s *Server) Install(ctx context.Context, crds []byte, without ...string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	var served []string
	for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(crds), 4096); ; {
		var crd map[string]any
		if err := d.Decode(&crd); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("read the kinds: %w", err)
		}
		if crd == nil {
			continue
		}
		spec := crd["spec"].(map[string]any)
		names := spec["names"].(map[string]any)
		if slices.Contains(without, names["kind"].(string)) {
			continue
		}
		if err := s.Send(ctx, http.MethodPost, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd); err != nil {
			return err
		}
		for _, v := range spec["versions"].([]any) {
			if v := v.(map[string]any); v["served"] == true {
				served = append(served, fmt.Sprintf("/apis/%s/%s/%s", spec["group"], v["name"], names["plural"]))
			}
		}
	}
	for _, path := range served {
		for s.Send(ctx, http.MethodGet, path, nil) != nil {
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s is not served: %w", path, ctx.Err())
			case <-time.After(pollInterval):
			}
		}
	}
	return nil
}

// Grant gives users the rights of one of the sets of roles in templates/rbac, and makes what they need. Only the users of
// the last call have them.
func (s *Server) Grant(ctx context.Context, role string, users ...string) error {
	text, ok := templates.RBAC(role)
	if !ok {
		return fmt.Errorf("there are no roles %s", role)
	}
	var subjects []string
	for _, u := range users {
		subjects = append(subjects, "- {kind: User, apiGroup: rbac.authorization.k8s.io, name: "+u+"}")
	}
	text = strings.ReplaceAll(text, "- {kind: ServiceAccount, namespace: meshery-filters, name: meshery-filters}", strings.Join(subjects, "\n"))
	for d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096); ; {
		var o map[string]any
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the roles %s: %w", role, err)
		}
		if err := s.Apply(ctx, o); err != nil {
			return err
		}
	}
}

// Path is where the server has an object.
func Path(o map[string]any) string {
	meta := o["metadata"].(map[string]any)
	p := "/apis/" + o["apiVersion"].(string)
	if o["apiVersion"] == "v1" {
		p = "/api/v1"
	}
	if ns, ok := meta["namespace"].(string); ok {
		p += "/namespaces/" + ns
	}
	plural := strings.ToLower(o["kind"].(string))
	switch {
	case strings.HasSuffix(plural, "entry"):
		plural = strings.TrimSuffix(plural, "y") + "ies"
	case !strings.HasSuffix(plural, "s"):
		plural += "s"
	}
	return p + "/" + plural + "/" + meta["name"].(string)
}
