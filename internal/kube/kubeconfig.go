package kube

import (
	"errors"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/meshery/meshery-filters/internal/address"
	"github.com/meshery/meshery-filters/internal/problem"
)

// maxKubeconfig bounds a kubeconfig, in bytes. One with a hundred contexts has a tenth of it.
const maxKubeconfig = 1 << 20

// parse makes the client's configuration of what came from outside.
func parse(data []byte, context string, allow Allow) (*rest.Config, error) {
	if len(data) > maxKubeconfig {
		return nil, problem.KubeconfigRefused.New("it has %d bytes, and %d is the most", len(data), maxKubeconfig)
	}
	// The parser's errors quote what they cannot read, which may be a token.
	config, err := clientcmd.Load(data)
	if err != nil {
		return nil, problem.KubeconfigRefused.New("it is no kubeconfig in YAML or JSON")
	}
	return configOf(config, context, allow)
}

// Portable is one context of a kubeconfig file as text that means the same on another machine: with the contents of the
// files that it names, and without what belongs to other contexts. context may be empty for the current one.
func Portable(file, context string) ([]byte, error) {
	config, err := loadFile(file)
	if err != nil {
		return nil, err
	}
	if context != "" {
		config.CurrentContext = context
	}
	if err := hasContext(config, config.CurrentContext); err != nil {
		return nil, err
	}
	if err := clientcmdapi.MinifyConfig(config); err != nil {
		return nil, problem.KubeconfigRefused.New("%w", err)
	}
	for _, user := range config.AuthInfos {
		if user.TokenFile == "" {
			continue
		}
		token, err := os.ReadFile(user.TokenFile)
		if err != nil {
			return nil, problem.KubeconfigRefused.New("%w", err)
		}
		user.Token, user.TokenFile = strings.TrimSpace(string(token)), ""
	}
	if err := clientcmdapi.FlattenConfig(config); err != nil {
		return nil, problem.KubeconfigRefused.New("%w", err)
	}
	return clientcmd.Write(*config)
}

// hasContext refuses a kubeconfig without that context.
func hasContext(config *clientcmdapi.Config, context string) error {
	if config.Contexts[context] != nil {
		return nil
	}
	there := ""
	if len(config.Contexts) > 0 {
		there = "; there are " + clean(strings.Join(slices.Sorted(maps.Keys(config.Contexts)), ", "), 200)
	}
	if context == "" {
		return problem.KubeconfigRefused.New("it has no current-context%s", there)
	}
	return problem.KubeconfigRefused.New("it has no context %q%s", clean(context, 100), there)
}

// loadFile reads a kubeconfig file, and makes the paths in it absolute.
func loadFile(file string) (*clientcmdapi.Config, error) {
	loaded, err := clientcmd.LoadFromFile(file)
	var path *fs.PathError
	if errors.As(err, &path) {
		return nil, problem.KubeconfigRefused.New("%w", path)
	}
	if err == nil {
		err = clientcmd.ResolveLocalPaths(loaded)
	}
	if err != nil {
		return nil, problem.KubeconfigRefused.New("%s is no kubeconfig in YAML or JSON", file)
	}
	return loaded, nil
}

// configOf makes the client's configuration of the context that is used; the others do not matter. It takes over what it
// knows, and nothing else.
func configOf(config *clientcmdapi.Config, context string, allow Allow) (*rest.Config, error) {
	if context == "" {
		context = config.CurrentContext
	}
	if err := hasContext(config, context); err != nil {
		return nil, err
	}
	used := config.Contexts[context]
	cluster, ok := config.Clusters[used.Cluster]
	if !ok {
		return nil, problem.KubeconfigRefused.New("the context %q is of a cluster that it does not have", clean(context, 100))
	}
	user := config.AuthInfos[used.AuthInfo]
	if user == nil {
		if used.AuthInfo != "" {
			return nil, problem.KubeconfigRefused.New("the context %q is of a user that it does not have", clean(context, 100))
		}
		user = &clientcmdapi.AuthInfo{}
	}
	if err := problem.KubeconfigRefused.WithFields("", mistakes(cluster, user, allow)); err != nil {
		return nil, err
	}
	c := &rest.Config{
		Host: cluster.Server,
		TLSClientConfig: rest.TLSClientConfig{
			ServerName: cluster.TLSServerName, Insecure: cluster.InsecureSkipTLSVerify,
			CAData: cluster.CertificateAuthorityData, CAFile: cluster.CertificateAuthority,
			CertData: user.ClientCertificateData, CertFile: user.ClientCertificate,
			KeyData: user.ClientKeyData, KeyFile: user.ClientKey,
		},
		BearerToken: user.Token, BearerTokenFile: user.TokenFile,
		Username: user.Username, Password: user.Password,
		Impersonate: rest.ImpersonationConfig{UserName: user.Impersonate, UID: user.ImpersonateUID,
			Groups: user.ImpersonateGroups, Extra: user.ImpersonateUserExtra},
		ExecProvider: user.Exec,
	}
	if user.Exec != nil {
		user.Exec.InteractiveMode = clientcmdapi.NeverExecInteractiveMode // there is no terminal to ask at
	}
	switch {
	case cluster.ProxyURL != "":
		proxy, err := url.Parse(cluster.ProxyURL)
		if err != nil {
			return nil, problem.KubeconfigRefused.New("cluster.proxy-url cannot be read")
		}
		c.Proxy = http.ProxyURL(proxy)
	case allow.Proxy:
		c.Proxy = http.ProxyFromEnvironment
	}
	return c, nil
}

// mistakes lists all that is not allowed. Values are not quoted, since some are secrets.
func mistakes(cluster *clientcmdapi.Cluster, user *clientcmdapi.AuthInfo, allow Allow) []problem.Field {
	var fields []problem.Field
	refuse := func(path, cause, remedy string) {
		fields = append(fields, problem.Field{Path: path, Cause: cause, Remedy: remedy})
	}
	for _, f := range []struct{ path, value, remedy string }{
		{"cluster.certificate-authority", cluster.CertificateAuthority, "certificate-authority-data"},
		{"user.client-certificate", user.ClientCertificate, "client-certificate-data"},
		{"user.client-key", user.ClientKey, "client-key-data"},
		{"user.tokenFile", user.TokenFile, "token"},
	} {
		switch {
		case f.value != "" && !allow.Files:
			refuse(f.path, "a file of the adapter's machine may not be read", "use "+f.remedy+", as `kubectl config view --flatten --minify` writes it")
		case f.value != "" && !filepath.IsAbs(f.value):
			refuse(f.path, "a relative path is relative to nothing here", "use an absolute one")
		}
	}
	if user.Exec != nil && !allow.Exec {
		refuse("user.exec", "a program may not be run", "use a token or a client certificate of a ServiceAccount")
	}
	if user.AuthProvider != nil {
		refuse("user.auth-provider", "it is not supported: Kubernetes gave it up for exec", "use a token or a client certificate of a ServiceAccount")
	}
	if cluster.ProxyURL != "" && !allow.Proxy {
		refuse("cluster.proxy-url", "a proxy may not be used", "leave it out")
	}
	if cluster.InsecureSkipTLSVerify && !allow.Insecure {
		refuse("cluster.insecure-skip-tls-verify", "the server has to be known by its certificate", "use certificate-authority-data")
	}
	if strings.ContainsAny(user.Token, "\r\n") {
		refuse("user.token", "it has a line break", "use the token alone")
	}
	return append(fields, serverMistakes(cluster.Server, allow)...)
}

func serverMistakes(server string, allow Allow) []problem.Field {
	refuse := func(cause, remedy string) []problem.Field {
		return []problem.Field{{Path: "cluster.server", Cause: cause, Remedy: remedy}}
	}
	u, err := url.Parse(server)
	switch {
	case err != nil || u.Hostname() == "" || u.Opaque != "":
		return refuse("it is no address", "write https://HOST:PORT")
	case u.Scheme != "https" && u.Scheme != "http":
		return refuse("its scheme is neither https nor http", "write https://HOST:PORT")
	case u.Scheme == "http" && !allow.Insecure:
		return refuse("credentials may not be sent in clear", "use https")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return refuse("it has a user, a query or a fragment", "write https://HOST:PORT")
	}
	// A name is looked at when it is dialled, and what it then stands for.
	if a, err := netip.ParseAddr(u.Hostname()); err == nil && !allow.LinkLocal {
		if why := address.Refused(a, true); why != "" {
			return refuse("it is "+why, "use the API server's own address")
		}
	}
	return nil
}

func joinHostPort(host, port string) string { return net.JoinHostPort(strings.Trim(host, "[]"), port) }
